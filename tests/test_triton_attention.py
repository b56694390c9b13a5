"""
Attention's kernels against the reference, in output and every gradient, and what must hold of any
attention, on both paths: torch and Triton (on a GPU compiled, elsewhere in Triton's interpreter,
which computes wrongly in bf16).
"""
import sys

import pytest
import torch
from gradients import assert_same, normal, packed, results

import kernels

attention_file, launch_file = sys.modules["kernels.attention"], sys.modules["kernels.launch"]
if not launch_file.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)
ON_GPU = not launch_file.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
MASKS = ["causal", "full", "documents", "causal documents", "prefix"]


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(launch_file, "WANTED", "triton")


@pytest.fixture(params=["torch", "triton"])
def path(request, monkeypatch):
    monkeypatch.setattr(launch_file, "WANTED", request.param)


on_both_paths = pytest.mark.usefixtures("path")


def options(mask: str, B: int, T: int) -> dict:
    prefix = torch.tensor([T // 2, T + 3])[:B].to(DEVICE)
    return {"causal": {}, "full": {"causal": False}, "prefix": {"prefix": prefix},
            "documents": {"documents": packed(B, T).to(DEVICE), "causal": False},
            "causal documents": {"documents": packed(B, T).to(DEVICE)}}[mask]


def inputs(B, T, H, K, C, dtype=torch.float32, keys=None):
    return [normal(B, n, heads, C, dtype=dtype, device=DEVICE)
            for n, heads in ((T, H), (keys or T, K), (keys or T, K))]


def tolerance(dtype) -> float:
    """Of the largest value. Half precision: P or dS, the output (delta is made of it), the result
    and the reference's are each off by half an eps at most. Sums in fp32: far below 1e-5."""
    return 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def may_see(mask: str, given: dict, B: int, T: int) -> torch.Tensor:
    """(B, T, T): may token i see token j? Said once more, token by token."""
    def one(b, i, j):
        if mask == "prefix":
            return j <= i or j < given["prefix"][b].item()
        same = "documents" not in given or given["documents"][b, i] == given["documents"][b, j]
        return bool(same) and (j <= i or "causal" not in mask)
    return torch.tensor([[[one(b, i, j) for j in range(T)] for i in range(T)] for b in range(B)])


def dense(q, k, v, lo, hi):
    """Attention of query i to the keys lo[i] <= j < hi[i], with all scores in memory."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    j = torch.arange(k.shape[1], device=q.device)
    seen = ((lo[..., None] <= j) & (j < hi[..., None]))[:, None]
    scores = torch.einsum("bihc,bjhc->bhij", q, k) / q.shape[3] ** 0.5
    P = scores.masked_fill(~seen, -1e9).softmax(-1) * seen           # rows without a key: zeros
    return torch.einsum("bhij,bjhc->bihc", P, v)


# ---------------------------------------------------------------------- equal to the reference

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("B, T, H, K, C", [(2, 37, 1, 1, 20), (1, 23, 2, 1, 6), (1, 18, 3, 1, 16)])
def test_attention_equals_its_reference(B, T, H, K, C, mask, dtype):
    given = options(mask, B, T)
    assert_same(lambda *x: kernels.attention(*x, **given),
                lambda *x: kernels.attention_reference(*x, **given),
                *inputs(B, T, H, K, C, dtype), tolerance=tolerance(dtype))


@pytest.mark.parametrize("tile", [(16, 16), (16, 32), (64, 16)])
def test_tiles_of_all_sizes_give_the_same(tile, monkeypatch):
    monkeypatch.setattr(attention_file, "TILE_INTERPRETED", (*tile, 4, 1))
    documents = packed(1, 49).to(DEVICE)
    assert_same(lambda *x: kernels.attention(*x, documents=documents),
                lambda *x: kernels.attention_reference(*x, documents=documents),
                *inputs(1, 49, 1, 1, 4))


@pytest.mark.parametrize("Tq, Tk", [(21, 37), (37, 21)])
def test_any_intervals_of_keys_are_served_and_rows_without_keys_give_exact_zeros(Tq, Tk):
    q, k, v = inputs(2, Tq, 2, 1, 6, keys=Tk)
    lo, hi = (torch.randint(0, Tk + 1, (2, Tq)).sort(1).values.int().to(DEVICE) for _ in range(2))
    lo[0, -3:], hi[0, :2] = Tk, 0                          # the last and the first rows see nothing
    fused = attention_file.FusedAttention.apply
    assert_same(lambda *x: fused(*x, lo, hi, False), lambda *x: dense(*x, lo, hi), q, k, v)
    out, dq, dk, dv = results(lambda *x: fused(*x, lo, hi, False), q, k, v)
    blind = lo >= hi                                                             # (B, Tq)
    j = torch.arange(Tk, device=DEVICE)
    unseen = ~((lo[..., None] <= j) & (j < hi[..., None])).any(1)                # (B, Tk)
    assert blind.any() and not blind.all() and unseen.any()
    assert not (out[blind].any() or dq[blind].any() or dk[unseen].any() or dv[unseen].any())


@pytest.mark.parametrize("lengths", [None, torch.tensor([21, 17]), torch.tensor([9, 3]).int()])
@pytest.mark.parametrize("Tq, Tk", [(21, 37), (37, 21), (1, 33)])
def test_the_keys_of_another_text_are_seen_up_to_its_length(Tq, Tk, lengths):
    given = {"causal": False, "lengths": None if lengths is None else lengths.to(DEVICE)}
    assert_same(lambda *x: kernels.attention(*x, **given),
                lambda *x: kernels.attention_reference(*x, **given),
                *inputs(2, Tq, 2, 1, 6, keys=Tk))


def test_the_prompt_of_a_prefix_model_sees_all_of_itself():
    starts, T = torch.tensor([0, 7], device=DEVICE), 19
    q, k, v = inputs(2, T, 2, 1, 4)
    out = kernels.decode_attention(q, k, v, starts, T, causal=False)
    for b, start in enumerate(starts.tolist()):
        alone = [x[b:b + 1, start:] for x in (q, k, v)]
        expected = kernels.attention_reference(*alone, causal=False)
        torch.testing.assert_close(out[b, start:], expected[0])


def test_views_are_served_where_they_lie():
    """q, k, v as slices of one projection, and as (B, heads, T, C) seen from the side."""
    joint = normal(2, 19, 6, 8, device=DEVICE)
    def sliced(x):
        return kernels.attention(*x.split((2, 2, 2), dim=2))
    def turned(x):
        q, k, v = x.transpose(1, 2).contiguous().transpose(1, 2).split((2, 2, 2), dim=2)
        addressed = attention_file.addressed(q, k, v)
        assert [x.data_ptr() for x in addressed[:3]] == [x.data_ptr() for x in (q, k, v)]
        return kernels.attention(q, k, v)
    def copied(x):
        return kernels.attention_reference(*(y.contiguous() for y in x.split((2, 2, 2), dim=2)))
    assert_same(sliced, copied, joint)
    assert_same(turned, copied, joint)


# ---------------------------------------------------------------------- who sees whom

@on_both_paths
@pytest.mark.parametrize("mask", MASKS)
def test_exactly_those_that_may_see_a_token_change_with_it(mask):
    B, T = 2, 19
    given = options(mask, B, T)
    q, k, v = inputs(B, T, 1, 1, 4)
    seen = may_see(mask, given, B, T)
    before = kernels.attention(q, k, v, **given)
    for j in (0, 15, 16, T - 1):                        # borders of tiles among them
        k2, v2 = k.clone(), v.clone()
        k2[:, j] += 1
        v2[:, j] += 1
        change = (kernels.attention(q, k2, v2, **given) - before).abs().amax((2, 3))
        assert torch.equal(change.cpu() > 0, seen[:, :, j])


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_tiles_that_no_row_of_a_tile_sees_are_never_read():
    """What is there, NaN, would show: another document, and the future."""
    q, k, v = inputs(1, 256, 1, 1, 4)
    documents = (torch.arange(256, device=DEVICE) >= 128).long()[None]
    expected = kernels.attention(q, k, v, documents=documents)
    k[:, :128] = v[:, :128] = torch.nan
    out = kernels.attention(q, k, v, documents=documents)
    assert torch.equal(out[:, 128:], expected[:, 128:]) and out[:, :128].isnan().all()
    out = kernels.attention(q.flip(1), k.flip(1), v.flip(1))
    assert out[:, :128].isfinite().all() and out[:, 128:].isnan().all()


@on_both_paths
def test_padding_as_a_document_of_its_own_changes_nothing():
    q, k, v = inputs(2, 23, 2, 1, 4)
    starts = [0, 6]
    documents = torch.tensor([[int(t >= start) for t in range(23)] for start in starts])
    out = kernels.attention(q, k, v, documents=documents.to(DEVICE))
    for b, start in enumerate(starts):
        alone = kernels.attention(*(x[b:b + 1, start:] for x in (q, k, v)))
        torch.testing.assert_close(out[b, start:], alone[0])


# ---------------------------------------------------------------------- decoding

def cached(B, S, K, C, dtype=torch.float32):
    """A cache of keys or values as the model has them: (B, S, K, C) that lies as (B, K, S, C)."""
    return normal(B, K, S, C, dtype=dtype, device=DEVICE).transpose(1, 2)


def decoded(q, k, v, starts, length):
    """What decode_attention is to give; zeros for queries in the padding."""
    own = torch.arange(length - q.shape[1], length, device=DEVICE).expand(len(q), -1)
    return dense(q.float(), k[:, :length].float(), v[:, :length].float(),
                 starts[:, None].expand_as(own), own + 1)


@on_both_paths
def test_decoding_token_by_token_equals_attention_over_all():
    q, (k, v) = normal(2, 70, 3, 8, device=DEVICE), (cached(2, 80, 1, 8) for _ in "kv")
    expected = kernels.attention(q, k[:, :70], v[:, :70])
    none = torch.zeros(2, dtype=torch.long, device=DEVICE)
    for i in (0, 15, 16, 69):
        out = kernels.decode_attention(q[:, i:i + 1], k, v, none, i + 1)
        torch.testing.assert_close(out, expected[:, i:i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new, H, K", [(1, 2, 2), (1, 6, 2), (5, 3, 1), (20, 2, 2)])
def test_decoding_over_a_ragged_cache_equals_the_reference(new, H, K, dtype):
    """Queries stay fp32: they are rounded to the cache's dtype, as P is; sums are fp32."""
    q, (k, v) = normal(3, new, H, 20, device=DEVICE), (cached(3, 50, K, 20, dtype) for _ in "kv")
    starts = torch.tensor([0, 17, 36], device=DEVICE)
    k[:, 37:] = v[:, 37:] = torch.nan                      # what comes behind is not read
    out, expected = kernels.decode_attention(q, k, v, starts, 37), decoded(q, k, v, starts, 37)
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() <= tolerance(dtype) * v[:, :37].abs().max()


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_decoding_is_the_same_in_any_number_of_shares(programs, monkeypatch):
    """Among them shares that a row with few tokens leaves empty."""
    monkeypatch.setattr(attention_file, "multiprocessors", lambda device: programs)
    q, (k, v) = normal(2, 1, 2, 4, device=DEVICE), (cached(2, 300, 1, 4) for _ in "kv")
    starts = torch.tensor([3, 299], device=DEVICE)
    torch.testing.assert_close(kernels.decode_attention(q, k, v, starts, 300),
                               decoded(q, k, v, starts, 300))


# ---------------------------------------------------------------------- use

def test_a_compiler_can_trace_it_without_a_break():
    """aot_eager: dynamo and autograd as torch.compile runs them, without the C++."""
    documents, prefix = packed(2, 19).to(DEVICE), torch.tensor([3, 19], device=DEVICE)
    starts = torch.tensor([0, 5], device=DEVICE)

    def everything(q, k, v):
        x = kernels.attention(q, k, v, documents=documents)
        x = kernels.attention(x, k, v, prefix=prefix)
        with torch.no_grad():
            new = [kernels.decode_attention(q[:, -n:], k, v, starts, 19).mean() for n in (1, 4)]
        return x + sum(new)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    assert_same(compiled, everything, *inputs(2, 19, 1, 1, 4))


def test_walking_backward_twice_gives_the_same_gradients():
    q, k, v = (x.requires_grad_() for x in inputs(1, 19, 2, 1, 4))
    out = kernels.attention(q, k, v).square().sum()
    first = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, torch.autograd.grad(out, (q, k, v))))


@pytest.mark.parametrize("B, T", [(0, 5), (2, 0)])
def test_nothing_in_nothing_out(B, T):
    out, *gradients = results(kernels.attention, *inputs(B, T, 2, 1, 4))
    assert out.shape == (B, T, 2, 4) and [x.numel() for x in gradients] == [0, 0, 0]
    starts = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert kernels.decode_attention(*inputs(0, 1, 2, 1, 4, keys=9), starts, 9).shape == (0, 1, 2, 4)


@pytest.mark.parametrize("call, said", [
    (lambda: kernels.attention(*inputs(1, 2, 1, 1, 258)), "head width C is 258.* 1 to 256"),
    (lambda: kernels.attention(*inputs(1, 2, 1, 1, 4, torch.float64)), "q is torch.float64"),
    (lambda: kernels.attention(*inputs(1, 2, 1, 1, 4)[:2], normal(1, 2, 1, 4).half()),
     "v torch.float16: they must be of one dtype"),
    (lambda: kernels.attention(*inputs(1, 2, 3, 2, 4)), "H a multiple of K"),
    (lambda: kernels.attention(*inputs(1, 2, 1, 1, 4), prefix=torch.ones(1).int(),
                               documents=torch.ones(1, 2)), "prefix .*without documents"),
    (lambda: kernels.attention(*inputs(1, 2, 1, 1, 4), prefix=torch.ones(1).int(), causal=False),
     "prefix .*with causal=True"),
    (lambda: kernels.attention(*inputs(1, 2, 1, 1, 4), prefix=torch.ones(2).int()),
     r"prefix \(2,\) must be \(1,\)"),
    (lambda: kernels.decode_attention(*inputs(2, 1, 1, 1, 4, keys=3), torch.zeros(1).int(), 3),
     r"starts has shape \(1,\)")])
def test_what_is_not_served_is_refused_by_name(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("mask", MASKS)
def test_wide_heads_are_served_forward_and_trained_by_torchs_attention(mask):
    given, wide = options(mask, 2, 5), inputs(2, 5, 2, 1, 200)
    torch.testing.assert_close(kernels.attention(*wide, **given),
                               kernels.attention_reference(*wide, **given))
    assert_same(lambda *x: kernels.attention(*x, **given),
                lambda *x: kernels.attention_reference(*x, **given), *wide)
