"""
The Triton kernels against their references, in output and every gradient, at awkward sizes: on a
GPU as compiled code in fp32, bf16 and fp16, elsewhere in Triton's interpreter in fp32 and fp16 (it
computes wrongly in bf16).
"""
import sys

import pytest
import torch
from gradients import assert_same, normal
from torch._dynamo.testing import CompileCounterWithBackend

import kernels

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")   # numpy, on NaN
cross_entropy_file = sys.modules["kernels.cross_entropy"]
launch_file = sys.modules["kernels.launch"]
if not launch_file.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)
ON_GPU = not launch_file.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(launch_file, "WANTED", "triton")


def tolerance(dtype) -> float:
    """Of the largest value: three roundings to half precision; sums in fp32 err by far less than
    1e-5 at these sizes."""
    return 1e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps


def compare(function, reference, dtype, *shapes):
    inputs = [normal(*shape, dtype=dtype, device=DEVICE) for shape in shapes]
    assert_same(function, reference, *inputs, tolerance=tolerance(dtype))


# ---------------------------------------------------------------------- norm, activation, rotation

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 5, 7), (9, 33), (70, 130), (5, 5000)])
def test_rmsnorm_equals_its_reference(shape, dtype):
    weight = normal(shape[-1], device=DEVICE)                        # fp32, as in the model
    compare(lambda x: kernels.rmsnorm(x, weight), lambda x: kernels.rmsnorm_reference(x, weight),
            dtype, shape)
    compare(kernels.rmsnorm, kernels.rmsnorm_reference, dtype, shape, shape[-1:])


def test_rmsnorm_of_views_has_the_gradients_of_their_copies():
    def parts(norm, x, y, z):
        weight = z[1, :, 0]                                                # a column: strided
        return norm(x[:, :5], weight), norm(y.T, weight), norm(z[:, :, 1:2].mT, weight)
    assert_same(lambda *x: parts(kernels.rmsnorm, *x),
                lambda *x: parts(kernels.rmsnorm_reference, *x),
                *(normal(*shape, device=DEVICE) for shape in ((7, 9), (5, 6), (3, 5, 2))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (3, 5, 7), (70, 130)])
def test_addition_and_rmsnorm_equal_their_references(shape, dtype):
    def reference(x, delta, weight):
        return x + delta, kernels.rmsnorm_reference(x + delta, weight)
    compare(kernels.add_rmsnorm, reference, dtype, shape, shape, shape[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (2, 66), (3, 4200)])
def test_swiglu_equals_its_reference(shape, dtype):
    compare(kernels.swiglu, kernels.swiglu_reference, dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, K, C", [(1, 1, 1, 1, 2), (2, 5, 6, 2, 12), (3, 4, 5, 5, 80)])
@pytest.mark.parametrize("batched", [False, True])
def test_rope_equals_its_reference(B, T, H, K, C, batched, dtype):
    angles = normal(*([B] * batched), T, C // 2, device=DEVICE)
    compare(lambda q, k: kernels.rope(q, k, angles.cos(), angles.sin()),
            lambda q, k: kernels.rope_reference(q, k, angles.cos(), angles.sin()),
            dtype, (B, T, H, C), (B, T, K, C))


# ---------------------------------------------------------------------- cross-entropy

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("N, V", [(1, 2), (5, 37), (3, 4500)])
def test_cross_entropy_equals_its_reference(N, V, with_entropy, dtype):
    targets = torch.randint(0, V, (N,), device=DEVICE)
    eye = torch.eye(V, device=DEVICE)
    compare(lambda z: kernels.cross_entropy(z, targets, 0.7, with_entropy),
            lambda z: kernels.linear_cross_entropy_reference(z.float(), eye, targets, 0.7,
                                                             with_entropy), dtype, (N, V))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [0, 2**20])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_linear_cross_entropy_equals_its_reference(with_entropy, keep, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy_file, "ROWS", 3)
    monkeypatch.setattr(cross_entropy_file, "CHUNK", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(cross_entropy_file, "KEEP", {"cpu": keep, "cuda": keep})
    targets = torch.randint(0, 61, (7,), device=DEVICE)
    compare(lambda h, w: kernels.linear_cross_entropy(h, w, targets, 1.3, with_entropy),
            lambda h, w: kernels.linear_cross_entropy_reference(h, w, targets, 1.3, with_entropy),
            dtype, (7, 24), (61, 24))


def test_probabilities_of_zero_and_large_logits_leave_no_nan():
    z = torch.tensor([[0.0, -torch.inf, 500.0], [-3e4, 2.0, 2.0]], device=DEVICE).requires_grad_()
    logp, entropy = kernels.cross_entropy(z, torch.tensor([2, 1], device=DEVICE), with_entropy=True)
    (logp.sum() + entropy.sum()).backward()
    expected = torch.tensor([0.0, 0.5], device=DEVICE).log()
    torch.testing.assert_close(logp, torch.tensor([0.0, expected[1]], device=DEVICE))
    torch.testing.assert_close(entropy, torch.tensor([0.0, -expected[1]], device=DEVICE))
    assert z.grad.isfinite().all()


def test_logits_may_rule_out_any_number_of_tokens():
    z = normal(2, 4200, device=DEVICE)
    z[0, :4100], z[1, 5:] = -torch.inf, -torch.inf                         # whole tiles
    targets = torch.tensor([4150, 3], device=DEVICE)
    expected = z.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(kernels.cross_entropy(z, targets), expected)


def test_an_id_beyond_the_vocabulary_scores_nan_not_a_number():
    targets = torch.tensor([1, 4, -1], device=DEVICE)
    logp = kernels.cross_entropy(normal(3, 4, device=DEVICE), targets)
    assert logp.isnan().tolist() == [False, True, True]


# ---------------------------------------------------------------------- all of them

@pytest.mark.parametrize("call", [
    lambda: kernels.rmsnorm(normal(0, 4), normal(4)), lambda: kernels.swiglu(normal(2, 0, 6)),
    lambda: kernels.rope(normal(1, 0, 2, 4), normal(1, 0, 2, 4), normal(0, 2), normal(0, 2))[0]])
def test_nothing_in_nothing_out(call):
    assert call().numel() == 0


@pytest.mark.parametrize("call, said", [
    (lambda: kernels.rmsnorm(normal(2, 4).double(), normal(4)), "x is torch.float64"),
    (lambda: kernels.rmsnorm(normal(2, 9000), normal(9000)), "9000.*8192"),
    (lambda: kernels.add_rmsnorm(normal(2, 4), normal(2, 4).half(), normal(4)), "delta is .*16"),
    (lambda: kernels.add_rmsnorm(normal(2, 4), normal(2, 5), normal(4)), "delta has shape"),
    (lambda: kernels.swiglu(normal(2, 4).long()), "gate_up is torch.int64"),
    (lambda: kernels.cross_entropy(normal(2, 4), torch.zeros(2)), "targets is torch.float32"),
    (lambda: kernels.cross_entropy(normal(2, 4).double(), torch.zeros(2).long()), "logits is .*64"),
    (lambda: kernels.rope(normal(1, 3, 2, 4), normal(1, 3, 2, 4).half(), normal(3, 2),
                          normal(3, 2)), "k is torch.float16")])
def test_what_a_kernel_does_not_serve_is_refused_by_name(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_tensors_on_another_device_are_refused(monkeypatch):
    monkeypatch.setattr(launch_file, "INTERPRETED", not launch_file.INTERPRETED)
    with pytest.raises(ValueError, match=f"gate_up is on {DEVICE}.*TRITON_INTERPRET"):
        kernels.swiglu(normal(2, 4, device=DEVICE))


def test_a_compiler_can_trace_all_kernels_without_a_break():
    def everything(h, delta, w, angles):
        h, x = kernels.add_rmsnorm(h, delta, w[0])
        q, k = (kernels.rmsnorm(x, w[1]).view(2, 5, 2, 4) for _ in range(2))
        q, k = kernels.rope(q, k, angles.cos(), angles.sin())
        x = kernels.swiglu(torch.cat((h, (q + k).reshape(10, 8)), -1))
        return kernels.linear_cross_entropy(x, w, torch.arange(10, device=DEVICE) % 9,
                                            with_entropy=True)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    angles = normal(5, 2, device=DEVICE)
    inputs = [normal(*shape, device=DEVICE) for shape in ((10, 8), (10, 8), (9, 8))]
    assert_same(lambda *x: compiled(*x, angles), lambda *x: everything(*x, angles), *inputs)


@pytest.mark.parametrize("call", [
    kernels.swiglu, lambda x: kernels.rmsnorm(x, x.new_ones(8)),
    lambda x: kernels.add_rmsnorm(x, 2 * x, x.new_ones(8))[1],
    lambda x: kernels.cross_entropy(x, x.new_zeros(x.shape[0], dtype=torch.long))])
def test_compiled_code_serves_any_number_of_rows(call):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter)
    for n in range(3, 9):
        compiled(normal(n, 8, device=DEVICE).requires_grad_()).sum().backward()
    assert counter.frame_count == 2                    # for 3 rows, then for any number
