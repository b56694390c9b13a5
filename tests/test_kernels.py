"""Every fused operation against its plain reference, in output and every gradient."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import assert_same, normal, packed, results

import kernels

attention_file = sys.modules["kernels.attention"]
cross_entropy_file = sys.modules["kernels.cross_entropy"]
launch_file = sys.modules["kernels.launch"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seeded_and_small(monkeypatch):
    """Blocks and chunks small enough that every test crosses their borders."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention_file, "BLOCK", 4)
    monkeypatch.setattr(cross_entropy_file, "CHUNK", {"cpu": 1})
    monkeypatch.setattr(cross_entropy_file, "ROWS", 3)


ATTENTION_SIZES = [(1, 1, 1, 1, 2), (2, 7, 4, 2, 6), (3, 9, 3, 3, 5), (2, 13, 6, 1, 4),
                   (1, 8, 4, 4, 8)]             # B, T, H, K, C


# ---------------------------------------------------------------------- attention

@pytest.fixture(params=["torch's attention", "in blocks"])
def path(request, monkeypatch):
    """CPUs take the second in bf16 alone; here in fp32 and fp64, where errors show."""
    if request.param == "in blocks":
        monkeypatch.setattr(attention_file, "IN_BLOCKS", (torch.float32, torch.float64))


on_both_paths = pytest.mark.usefixtures("path")


@on_both_paths
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_documents", [True, False])
@pytest.mark.parametrize("B, T, H, K, C", ATTENTION_SIZES)
def test_attention_equals_its_reference(B, T, H, K, C, with_documents, causal):
    options = {"causal": causal, "documents": packed(B, T) if with_documents else None}
    assert_same(lambda *x: kernels.attention(*x, **options),
                lambda *x: kernels.attention_reference(*x, **options),
                normal(B, T, H, C), normal(B, T, K, C), normal(B, T, K, C))


@on_both_paths
@pytest.mark.parametrize("options", [
    {}, {"documents": torch.tensor([[0, 0, 0, 1, 1, 2, 2]] * 2)}, {"prefix": torch.tensor([2, 7])}])
def test_attention_with_any_mask_equals_its_reference(options):
    assert_same(lambda *x: kernels.attention(*x, **options),
                lambda *x: kernels.attention_reference(*x, **options),
                normal(2, 7, 4, 6), normal(2, 7, 2, 6), normal(2, 7, 2, 6))


def test_probabilities_that_are_too_many_are_not_kept(monkeypatch):
    shape = (2, 7, 4, 6)
    for keep, blocks in ((2 * 4 * 7 * 7 * 2, True), (2 * 4 * 7 * 7 * 2 - 1, False)):
        monkeypatch.setattr(attention_file, "KEEP", keep)
        mask = kernels.attention_mask(shape, shape, torch.bfloat16, torch.device("cpu"))
        assert (mask.biases is not None) == blocks


@on_both_paths
@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 2])])
@pytest.mark.parametrize("Tq, Tk", [(1, 9), (7, 7), (9, 3)])
def test_attention_to_the_keys_of_another_text_equals_its_reference(Tq, Tk, lengths):
    q, k, v = normal(2, Tq, 4, 6), normal(2, Tk, 2, 6), normal(2, Tk, 2, 6)
    options = {"causal": False, "lengths": lengths}
    assert_same(lambda *x: kernels.attention(*x, **options),
                lambda *x: kernels.attention_reference(*x, **options), q, k, v)
    if lengths is not None:                                    # padding is as good as absent
        alone = kernels.attention_reference(q[1:], k[1:, :2], v[1:, :2], causal=False)
        torch.testing.assert_close(kernels.attention(q, k, v, **options)[1:], alone)


@on_both_paths
def test_layers_of_one_pass_share_one_mask(monkeypatch):
    documents = packed(2, 13)
    mask = kernels.attention_mask((2, 13, 4, 6), (2, 13, 2, 6), torch.float32, documents.device,
                                  documents=documents)
    for _layer in range(2):
        q, k, v = normal(2, 13, 4, 6), normal(2, 13, 2, 6), normal(2, 13, 2, 6)
        expected = kernels.attention_reference(q, k, v, documents=documents)
        with monkeypatch.context() as patch:
            for maker in ("biases", "visible"):            # no mask can be made again
                patch.setattr(attention_file, maker, None)
            torch.testing.assert_close(kernels.attention(q, k, v, mask), expected)


def test_attention_reference_equals_a_loop_over_tokens():
    q, k, v, documents = normal(2, 6, 4, 8), normal(2, 6, 2, 8), normal(2, 6, 2, 8), packed(2, 6)
    out = kernels.attention_reference(q, k, v, documents=documents)
    for b, i, h in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(4)):
        seen = [j for j in range(i + 1) if documents[b, j] == documents[b, i]]
        weights = torch.stack([q[b, i, h] @ k[b, j, h // 2] / 8**0.5 for j in seen]).softmax(0)
        expected = sum(w * v[b, j, h // 2] for w, j in zip(weights, seen))
        torch.testing.assert_close(out[b, i, h], expected)


@on_both_paths
@pytest.mark.parametrize("options", [{"documents": torch.tensor([[0, 0, 1, 1, 1]])},
                                     {"prefix": torch.tensor([3])},
                                     {"lengths": torch.tensor([4]), "causal": False}])
def test_attention_gradients_equal_finite_differences(options):
    q, k, v = (torch.randn(1, 5, heads, 4, dtype=torch.float64, requires_grad=True)
               for heads in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: kernels.attention(*x, **options), (q, k, v))


@on_both_paths
@pytest.mark.parametrize("B, T, H, K, C", ATTENTION_SIZES[1:])
def test_no_token_sees_the_future_or_another_document(B, T, H, K, C):
    q, k, v, documents = normal(B, T, H, C), normal(B, T, K, C), normal(B, T, K, C), packed(B, T)
    before = kernels.attention(q, k, v, documents=documents)
    for j in range(T):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, j] += 1
        changed_v[:, j] += 1
        change = kernels.attention(q, changed_k, changed_v, documents=documents) - before
        may_see = (torch.arange(T) >= j) & (documents == documents[:, j:j + 1])     # (B, T)
        changed = change.flatten(2).abs().amax(-1) > 0
        assert torch.equal(changed, may_see)


def test_bfloat16_attention_errs_at_most_twice_as_much_as_torchs_own():
    """Both round inputs and P to bf16; ours also rounds the scores. Output and gradients."""
    def theirs(*inputs):
        heads_first = (x.transpose(1, 2) for x in inputs)
        return torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True).transpose(1, 2)
    inputs = [normal(2, 40, 4, 32) for _ in range(3)]
    half = [x.bfloat16() for x in inputs]
    exact = results(kernels.attention_reference, *inputs)
    for ours, other, right in zip(results(kernels.attention, *half), results(theirs, *half), exact):
        assert 0 < (ours - right).norm() <= 2 * (other - right).norm()


# ---------------------------------------------------------------------- decoding

def test_the_prompt_of_a_prefix_model_sees_all_of_itself():
    starts, T = torch.tensor([0, 3]), 6
    q, k, v = normal(2, T, 4, 8), normal(2, T + 2, 2, 8), normal(2, T + 2, 2, 8)
    out = kernels.decode_attention(q, k, v, starts, T, causal=False)
    for b, start in enumerate(starts.tolist()):
        alone = [x[b:b + 1, start:T] for x in (q, k, v)]
        expected = kernels.attention_reference(*alone, causal=False)
        torch.testing.assert_close(out[b, start:], expected[0])
    assert out.isfinite().all()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 4, 9])
@pytest.mark.parametrize("H, K", [(4, 4), (6, 2), (3, 1)])
def test_decoding_equals_full_attention_over_the_unpadded_tokens(H, K, new, cache_dtype):
    starts, T = torch.tensor([0, 3, 5]), 9
    q = normal(3, T, H, 8)
    k, v = (normal(3, T + 2, K, 8, dtype=cache_dtype) for _ in range(2))       # two slots unused
    out = kernels.decode_attention(q[:, T - new:], k, v, starts, T)
    assert out.isfinite().all() and out.dtype == q.dtype
    for b, start in enumerate(starts.tolist()):
        first = max(start, T - new)
        alone = kernels.attention_reference(
            *(x[b:b + 1, start:T].to(torch.float32) for x in (q, k, v)))[0, first - start:]
        torch.testing.assert_close(out[b, first - T:], alone, rtol=0,
                                   atol=1e-5 if cache_dtype == torch.float32 else 0.03)


def test_decoding_ignores_what_lies_in_the_padding_and_behind_the_newest_token():
    q, k, v = normal(2, 1, 4, 8), normal(2, 8, 2, 8), normal(2, 8, 2, 8)
    before = kernels.decode_attention(q, k, v, torch.tensor([2, 1]), 6)
    k[0, :2] = v[0, :2] = k[1, :1] = v[1, :1] = 1e4
    k[:, 6:] = v[:, 6:] = float("nan")
    assert torch.equal(kernels.decode_attention(q, k, v, torch.tensor([2, 1]), 6), before)


def test_decoding_is_the_same_for_both_layouts_of_the_cache():
    q, k, v = normal(3, 1, 4, 8), normal(3, 7, 2, 8), normal(3, 7, 2, 8)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    starts = torch.tensor([0, 1, 2])
    torch.testing.assert_close(kernels.decode_attention(q, *heads_first, starts, 6),
                               kernels.decode_attention(q, k, v, starts, 6))


# ---------------------------------------------------------------------- norm, activation, rotation

@pytest.mark.parametrize("shape", [(1, 3), (3, 5, 7), (2, 33), (0, 4)])
def test_rmsnorm_equals_its_reference(shape):
    x, weight = normal(*shape), normal(shape[-1])
    if len(x):
        assert_same(kernels.rmsnorm, kernels.rmsnorm_reference, x, weight)
    assert kernels.rmsnorm(x, weight).shape == shape


def test_rmsnorm_makes_rows_of_unit_mean_square():
    y = kernels.rmsnorm(100 * normal(4, 64), torch.ones(64), 1e-6)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4))


def test_rmsnorm_statistics_do_not_overflow_or_lose_digits_in_half_precision():
    x = torch.full((1, 64), 300.0, dtype=torch.float16)             # 300^2 is beyond float16
    assert torch.equal(kernels.rmsnorm(x, torch.ones(64)), torch.ones(1, 64, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (2, 66), (0, 4)])
def test_swiglu_equals_its_reference(shape):
    x = normal(*shape)
    if len(x):
        assert_same(kernels.swiglu, kernels.swiglu_reference, x)
    assert kernels.swiglu(x).shape == (*shape[:-1], shape[-1] // 2)


def test_swiglu_gates_with_the_first_half():
    out = kernels.swiglu(torch.tensor([[-100.0, 100.0, 0.0, 3.0, 2.0, 5.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 200.0, 0.0]]))


@pytest.mark.parametrize("table", [(5, 4), (2, 5, 4)])
def test_rope_equals_its_reference(table):
    angles = normal(*table)
    assert_same(lambda q, k: kernels.rope(q, k, angles.cos(), angles.sin()),
                lambda q, k: kernels.rope_reference(q, k, angles.cos(), angles.sin()),
                normal(2, 5, 4, 8), normal(2, 5, 2, 8))


def test_rope_scores_depend_on_the_distance_of_positions_alone():
    q, k = normal(1, 1, 1, 16).double(), normal(1, 1, 1, 16).double()
    frequencies = 100.0 ** (-torch.arange(8, dtype=torch.float64) / 8)

    def score(m: int, n: int) -> float:
        at_m, at_n = ((m * frequencies)[None], (n * frequencies)[None])
        turned_q, _ = kernels.rope(q, k, at_m.cos(), at_m.sin())
        _, turned_k = kernels.rope(q, k, at_n.cos(), at_n.sin())
        return (turned_q * turned_k).sum().item()
    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-9)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rope_turns_the_first_half_towards_the_second():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)          # pairs: channels 0-2 and 1-3
    quarter = torch.tensor([[torch.pi / 2, 0.3]])
    turned, _ = kernels.rope(x, x, quarter.cos(), quarter.sin())
    torch.testing.assert_close(turned.flatten(), torch.tensor([0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("function, inputs", [
    (kernels.rmsnorm, [(3, 5), (5,)]), (kernels.swiglu, [(3, 6)]),
    (lambda q, k: kernels.rope(q, k, torch.ones(3, 2) * 0.6, torch.ones(3, 2) * 0.8),
     [(2, 3, 2, 4), (2, 3, 1, 4)])])
def test_small_operations_gradients_equal_finite_differences(function, inputs):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in inputs]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_from_fp32_by_a_few_roundings_only(dtype):
    """Outputs and gradients, relative to their norms: at most four roundings' worth."""
    angles = normal(6, 8)
    q, k, v = normal(2, 6, 4, 16), normal(2, 6, 2, 16), normal(2, 6, 2, 16)
    targets = torch.randint(0, 50, (12,))
    for function, inputs in [
            (kernels.swiglu, [normal(9, 32)]),
            (lambda x: kernels.rmsnorm(x, torch.ones(32)), [normal(9, 32)]),
            (lambda q, k: kernels.rope(q, k, angles.cos(), angles.sin()), [q, k]),
            (kernels.attention, [q, k, v]),
            (lambda h, w: kernels.linear_cross_entropy(h, w, targets),
             [normal(12, 24), normal(50, 24) / 5])]:
        inputs = [x.to(dtype).float() for x in inputs]
        exact = results(function, *inputs)
        for ours, expected in zip(results(function, *(x.to(dtype) for x in inputs)), exact):
            assert (ours - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


# ---------------------------------------------------------------------- linear + cross-entropy

@pytest.mark.parametrize("keep", [0, 2**25])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("N, D, V", [(1, 1, 2), (7, 5, 11), (3, 6, 64)])
def test_linear_cross_entropy_equals_its_reference(N, D, V, temperature, with_entropy, keep,
                                                   monkeypatch):
    monkeypatch.setattr(cross_entropy_file, "KEEP", {"cpu": keep})
    targets = torch.randint(0, V, (N,))
    assert_same(lambda h, w: kernels.linear_cross_entropy(h, w, targets, temperature, with_entropy),
                lambda h, w: kernels.linear_cross_entropy_reference(h, w, targets, temperature,
                                                                    with_entropy),
                normal(N, D), normal(V, D))


@pytest.mark.parametrize("with_entropy", [True, False])
def test_linear_cross_entropy_gradients_equal_finite_differences(with_entropy):
    h, w = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5))
    targets = torch.randint(0, 5, (7,))
    assert torch.autograd.gradcheck(
        lambda h, w: kernels.linear_cross_entropy(h, w, targets, 1.3, with_entropy), (h, w))


def test_log_probability_and_entropy_of_a_uniform_prediction_are_the_logarithm_of_v():
    logp, entropy = kernels.linear_cross_entropy(torch.zeros(3, 4), normal(10, 4),
                                                 torch.arange(3), with_entropy=True)
    torch.testing.assert_close(-logp, torch.full((3,), 10.0).log())
    torch.testing.assert_close(entropy, torch.full((3,), 10.0).log())


def test_temperature_and_entropy_agree_with_log_softmax():
    h, w, targets = normal(5, 6), normal(9, 6), torch.randint(0, 9, (5,))
    logp, entropy = kernels.linear_cross_entropy(h, w, targets, 0.5, with_entropy=True)
    full = torch.log_softmax(h @ w.T / 0.5, -1)
    torch.testing.assert_close(logp, full[torch.arange(5), targets])
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=full).entropy())


def test_gradients_of_a_mean_over_many_rows_survive_bfloat16():
    """1/3000 has no exact bf16 form: rounding it would scale every gradient by up to 0.4 %."""
    h, w, targets = normal(3000, 8), normal(16, 8), torch.randint(0, 16, (3000,))

    def mean_loss(h, w):
        return kernels.linear_cross_entropy(h, w, targets).mean()
    h, w = h.bfloat16().float(), w.bfloat16().float()
    (_, dh, dw), (_, dh16, dw16) = results(mean_loss, h, w), results(mean_loss, h.bfloat16(), w)
    for ours, exact in ((dh16, dh), (dw16, dw)):
        assert abs((ours * exact).sum() / exact.square().sum() - 1) < 1e-3


def test_no_rows_have_no_log_probabilities_and_zero_gradients():
    h, w = torch.zeros(0, 4, requires_grad=True), normal(9, 4).requires_grad_()
    logp = kernels.linear_cross_entropy(h, w, torch.zeros(0, dtype=torch.long))
    logp.sum().backward()
    assert logp.shape == (0,) and h.grad.shape == (0, 4) and torch.equal(w.grad, torch.zeros(9, 4))


def test_a_frozen_weight_gets_no_gradient_and_a_frozen_input_none_either():
    h, w = normal(4, 3).requires_grad_(), normal(5, 3)
    kernels.linear_cross_entropy(h, w, torch.arange(4)).sum().backward()
    kernels.rmsnorm(h, w[0]).sum().backward()
    assert h.grad is not None and w.grad is None


@pytest.mark.parametrize("with_entropy", [True, False])
def test_cross_entropy_of_logits_is_that_of_an_identity_layer(with_entropy):
    targets = torch.randint(0, 9, (7,))
    assert_same(lambda z: kernels.cross_entropy(z, targets, 0.7, with_entropy),
                lambda z: kernels.linear_cross_entropy_reference(z, torch.eye(9), targets, 0.7,
                                                                 with_entropy), normal(7, 9))


# ---------------------------------------------------------------------- all of them

@pytest.mark.parametrize("call", [
    lambda: kernels.rmsnorm(normal(2, 4), normal(3)),
    lambda: kernels.swiglu(normal(2, 5)),
    lambda: kernels.rope(normal(1, 3, 2, 4), normal(1, 3, 2, 4), normal(4, 2), normal(4, 2)),
    lambda: kernels.attention(normal(1, 3, 3, 4), normal(1, 3, 2, 4), normal(1, 3, 2, 4)),
    lambda: kernels.attention(*[normal(2, 3, 1, 4)] * 3, documents=torch.zeros(1, 3)),
    lambda: kernels.attention(*[normal(2, 3, 1, 4)] * 3, lengths=torch.ones(2)),
    lambda: kernels.attention(normal(2, 3, 1, 4), *[normal(2, 5, 1, 4)] * 2),
    lambda: kernels.attention(*[normal(2, 3, 1, 4)] * 3, prefix=torch.ones(3)),
    lambda: kernels.decode_attention(*[normal(1, 3, 1, 4)] * 3, torch.zeros(1), 4),
    lambda: kernels.cross_entropy(normal(3, 4), torch.zeros(2)),
    lambda: kernels.cross_entropy(normal(3, 4), torch.zeros(3), -1.0),
    lambda: kernels.linear_cross_entropy(normal(3, 4), normal(9, 5), torch.zeros(3)),
    lambda: kernels.linear_cross_entropy(normal(3, 4), normal(9, 4), torch.zeros(3), 0.0)])
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match=r"\d"):
        call()


def test_inputs_and_saved_tensors_are_never_overwritten():
    """The same graph can be walked twice, and gives the same gradients."""
    h, w, targets = normal(6, 8).requires_grad_(), normal(9, 8), torch.randint(0, 9, (6,))
    cos, sin = torch.full((3, 2), 0.6), torch.full((3, 2), 0.8)
    q = kernels.rmsnorm(h, w[0]).view(2, 3, 2, 4)
    q, k = kernels.rope(q, q, cos, sin)
    x = kernels.attention(q, k, k).reshape(6, 8)
    x = kernels.swiglu(torch.cat((x, x), -1))
    logp = kernels.linear_cross_entropy(x, w, targets).sum()
    first, = torch.autograd.grad(logp, h, retain_graph=True)
    second, = torch.autograd.grad(logp, h)
    assert torch.equal(first, second) and first.abs().max() > 0


def test_a_compiler_can_trace_all_operations_without_a_break():
    """aot_eager: dynamo and autograd as torch.compile runs them, without the C++."""
    def everything(h, w, angles):
        q = kernels.rmsnorm(h, w[0]).view(2, 5, 2, 4)
        q, k = kernels.rope(q, q, angles.cos(), angles.sin())
        x = kernels.attention(q, k, 2 * k).reshape(10, 8)
        return kernels.linear_cross_entropy(kernels.swiglu(torch.cat((x, h), -1)), w,
                                            torch.arange(10) % 9, with_entropy=True)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    angles = normal(5, 2)
    assert_same(lambda h, w: compiled(h, w, angles), lambda h, w: everything(h, w, angles),
                normal(10, 8), normal(9, 8))


def test_backend_is_triton_on_gpus_only_unless_told_otherwise(monkeypatch):
    assert kernels.backend(torch.device("cpu")) == "torch"
    for wanted in ("torch", "triton"):
        monkeypatch.setattr(launch_file, "WANTED", wanted)
        assert kernels.backend(torch.device("cpu")) == wanted
    monkeypatch.setattr(launch_file, "WANTED", "cuda")
    with pytest.raises(ValueError, match="KERNELS='cuda'.*torch or triton"):
        kernels.backend()


def test_triton_is_asked_for_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(launch_file, "WANTED", "triton")
    monkeypatch.setattr(launch_file, "INSTALLED", False)
    with pytest.raises(ValueError, match="pip install triton"):
        kernels.backend()


def test_importing_kernels_runs_nothing_and_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import kernels; print(kernels.backend())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "torch\n" and done.stderr == ""
