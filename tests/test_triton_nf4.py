"""
NF4 weights: the code, the error of quantizing, and nf4_linear in both paths, torch and Triton (on a
GPU compiled, elsewhere in the interpreter, which computes wrongly in bf16).
"""
import io
import sys
from statistics import NormalDist

import pytest
import torch
from gradients import assert_same, normal

import kernels

launch_file, nf4_file = sys.modules["kernels.launch"], sys.modules["kernels.nf4"]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
PATHS = ["torch"] + ["triton"] * launch_file.INSTALLED
CODE = torch.tensor(nf4_file.CODE)
HALF_GAP = ((CODE[1:] - CODE[:-1]).max() / 2).item()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(launch_file, "WANTED", request.param)
    return request.param


on_both_paths = pytest.mark.usefixtures("path")


def weights(N: int, D: int) -> torch.Tensor:
    """Normal, of a different size in every row, with a row of zeros."""
    w = torch.randn(N, D) * torch.logspace(-3, 1, N)[:, None]
    w[N // 2] = 0
    return w


def per_weight(absmax: torch.Tensor, D: int) -> torch.Tensor:
    return absmax.repeat_interleave(64, 1)[:, :D]


def absmax_of(w: torch.Tensor) -> torch.Tensor:
    """(N, ceil(D / 64)), block by block."""
    return torch.stack([block.abs().amax(1) for block in w.split(64, dim=1)], 1)


# ---------------------------------------------------------------------- the code

def test_code_is_made_of_quantiles_of_a_normal_distribution():
    """QLoRA's construction: 8 quantiles above 0, 7 below, evenly spaced in probability from 0.5 to
    0.9677083, and 0 itself, all divided by the largest."""
    def quantiles(n):
        return [NormalDist().inv_cdf(0.5 + (0.9677083 - 0.5) * i / n) for i in range(1, n + 1)]
    code = torch.tensor(sorted([0.0, *quantiles(8), *(-q for q in quantiles(7))]))
    torch.testing.assert_close(CODE, code / code.max(), atol=1e-6, rtol=0)


def test_code_is_the_published_one():
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
                 -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
                 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    assert torch.equal(CODE, torch.tensor(published))


@on_both_paths
def test_a_byte_holds_the_even_column_in_its_high_half():
    # 2 * (code 15, code 0, code 7, code 8), then an odd end: code 1 and a filler of 0
    w = 2 * CODE[[15, 0, 7, 8, 1]][None].to(DEVICE)
    q = kernels.quantize_nf4(w, double=False)
    assert q.codes.tolist() == [[0xF0, 0x78, 0x17]] and q.absmax.tolist() == [[2.0]]
    assert torch.equal(kernels.dequantize_nf4(q, torch.float32), w)


# ---------------------------------------------------------------------- quantizing

@on_both_paths
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("N, D", [(1, 1), (5, 7), (6, 64), (35, 96), (300, 130)])
def test_no_weight_errs_by_more_than_half_a_gap_and_half_a_step(N, D, double):
    """|w - w^| <= gap / 2 * absmax + |absmax - decoded absmax|, whose bound is the scale / 2 of its
    256 blocks, counted here anew; 1e-6 of the largest weight for fp32."""
    w = weights(N, D)
    q = kernels.quantize_nf4(w.to(DEVICE), double)
    error = (kernels.dequantize_nf4(q, torch.float32).cpu() - w).abs()
    absmax = absmax_of(w)
    bound = HALF_GAP * absmax
    if double:
        groups = (absmax - absmax.mean()).flatten().split(256)
        steps = torch.cat([g.abs().max().expand(len(g)) / 127 for g in groups])
        bound = bound + steps.view_as(absmax) / 2
    assert (error <= per_weight(bound, D) + 1e-6 * w.abs().max()).all()
    if N * D > 1000 and not double:                        # and the bound is nearly met
        assert (error / per_weight(absmax, D).clamp(min=1e-9)).max() > 0.9 * HALF_GAP


def test_largest_gap_is_between_the_two_lowest_codes():
    assert HALF_GAP == pytest.approx((1 - 0.6961928) / 2, abs=1e-7)


@on_both_paths
def test_weights_that_are_codes_survive_exactly():
    w = CODE[torch.randint(0, 16, (9, 130))]
    w[:, ::64] = 1                                         # the absmax of each block is known
    w = (w * torch.rand(9, 1)).to(DEVICE)
    q = kernels.quantize_nf4(w, double=False)
    assert torch.equal(kernels.dequantize_nf4(q, torch.float32), w)


@on_both_paths
def test_quantizing_twice_changes_nothing():
    q = kernels.quantize_nf4(weights(35, 130).to(DEVICE), double=False)
    again = kernels.quantize_nf4(kernels.dequantize_nf4(q, torch.float32), double=False)
    assert torch.equal(q.codes, again.codes) and torch.equal(q.absmax, again.absmax)


@on_both_paths
def test_double_quantization_keeps_the_codes_of_a_second_round():
    q = kernels.quantize_nf4(0.02 * normal(64, 256, device=DEVICE))
    again = kernels.quantize_nf4(kernels.dequantize_nf4(q, torch.float32))
    assert torch.equal(q.codes, again.codes)


@on_both_paths
def test_zeros_stay_zeros_among_large_blocks():
    w = torch.zeros(4, 128)
    w[0, 0] = 100.0
    for matrix in (w, torch.zeros(4, 128)):
        q = kernels.quantize_nf4(matrix.to(DEVICE))
        out = kernels.dequantize_nf4(q, torch.float32).cpu()
        assert out[matrix == 0].abs().max() == 0
        torch.testing.assert_close(out, matrix, rtol=0.01, atol=0)


@on_both_paths
def test_small_blocks_are_never_turned_round_by_double_quantization():
    """The decoded absmax of the smallest block would be negative by half a step."""
    w = weights(300, 64)
    out = kernels.dequantize_nf4(kernels.quantize_nf4(w.to(DEVICE)), torch.float32).cpu()
    assert (out * w >= 0).all()


@pytest.mark.parametrize("double, bits", [(True, 4.127), (False, 4.5)])
def test_a_weight_takes_4_127_or_4_5_bits(double, bits):
    N, D = 512, 512                                        # 16 groups of 256 blocks
    q = kernels.quantize_nf4(torch.randn(N, D), double)
    counted = sum(len(t.numpy().tobytes()) for t in q[:4] if t is not None) * 8 / (N * D)
    assert kernels.bits_per_weight(q) == counted
    assert round(counted, 3) == bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_float_dtype_are_quantized(dtype):
    w = normal(3, 70).to(dtype)
    ours, expected = kernels.quantize_nf4(w), kernels.quantize_nf4(w.float())
    assert torch.equal(ours.codes, expected.codes) and torch.equal(ours.absmax, expected.absmax)


def test_quantizing_cuts_the_graph():
    q = kernels.quantize_nf4(torch.randn(3, 70).requires_grad_(), double=False)
    assert not q.absmax.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_counted(bad):
    w = torch.randn(4, 10)
    w[1, 2] = w[3, 9] = bad
    with pytest.raises(ValueError, match="weight has 2 NaN or infinite of 40 values"):
        kernels.quantize_nf4(w)


# ---------------------------------------------------------------------- the product

@on_both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("N, D", [(1, 1), (35, 96), (70, 130), (9, 600)])
def test_dequantizing_equals_its_reference(N, D, double, dtype):
    """code * absmax may differ in its last bit in fp32, and then in dtype's."""
    q = kernels.quantize_nf4(weights(N, D).to(DEVICE), double)
    ours, expected = kernels.dequantize_nf4(q, dtype), kernels.dequantize_nf4_reference(q, dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@on_both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 8), (17,)])
@pytest.mark.parametrize("N, D", [(35, 96), (70, 130), (3, 1)])
def test_linear_equals_the_product_with_the_dequantized_weight(N, D, rows, double, dtype):
    """Value and dx. Of the largest value: fp32 sums err by far less than 1e-5; in half precision
    one rounding of the result, one of w^ that one of the two may do without, one of a share."""
    q = kernels.quantize_nf4(torch.randn(N, D).to(DEVICE), double)
    w = kernels.dequantize_nf4_reference(q, dtype)
    assert_same(lambda x: kernels.nf4_linear(x, q), lambda x: x @ w.T,
                normal(*rows, D, dtype=dtype, device=DEVICE),
                tolerance=1e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps)


@on_both_paths
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("N", [5, 70])
def test_programs_share_the_columns_and_the_outputs(N, rows):
    """Sizes at which few_rows_kernel has several programs along each, and several steps."""
    q = kernels.quantize_nf4(normal(N, 1100, device=DEVICE))
    w = kernels.dequantize_nf4_reference(q, torch.float32)
    assert_same(lambda x: kernels.nf4_linear(x, q), lambda x: x @ w.T,
                normal(rows, 1100, device=DEVICE))


@on_both_paths
def test_linear_is_the_same_every_time():
    q, x = kernels.quantize_nf4(normal(70, 1100, device=DEVICE)), normal(4, 1100, device=DEVICE)
    assert torch.equal(kernels.nf4_linear(x, q), kernels.nf4_linear(x, q))


def test_gradient_equals_finite_differences(path):
    q = kernels.quantize_nf4(normal(5, 70, device=DEVICE))
    if path == "torch":
        x = torch.randn(2, 70, dtype=torch.float64, device=DEVICE, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: kernels.nf4_linear(x, q), x)
    else:                                                  # it is linear: dy . y(x) = dx . x
        x, dy = normal(2, 70, device=DEVICE).requires_grad_(), normal(2, 5, device=DEVICE)
        y = kernels.nf4_linear(x, q)
        dx, = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close((dy * y).sum(), (dx * x).sum(), rtol=1e-5, atol=1e-4)


@on_both_paths
def test_backward_keeps_the_four_bit_weight_and_nothing_else():
    q, x = kernels.quantize_nf4(normal(35, 96, device=DEVICE)), normal(17, 96, device=DEVICE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = kernels.nf4_linear(x.requires_grad_(), q)
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in q[:4])
    y.sum().backward()
    assert x.grad.abs().max() > 0


@on_both_paths
def test_the_weight_gets_no_gradient():
    q = kernels.quantize_nf4(normal(3, 64, device=DEVICE), double=False)
    q.absmax.requires_grad_()
    x = normal(2, 64, device=DEVICE).requires_grad_()
    dx, dw = torch.autograd.grad(kernels.nf4_linear(x, q).sum(), (x, q.absmax), allow_unused=True)
    assert dw is None and dx.abs().max() > 0


@on_both_paths
def test_a_module_can_hold_save_and_move_it():
    q = kernels.quantize_nf4(normal(5, 70))
    module, copy = torch.nn.Module(), torch.nn.Module()
    for name, tensor in zip(q._fields, q[:4]):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # nothing else is saved with it
        module.register_buffer(name, tensor)
        copy.register_buffer(name, torch.zeros_like(tensor))
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    copy.load_state_dict(torch.load(stored, weights_only=True))
    moved = kernels.NF4Weight(*copy.to(DEVICE).buffers(), 70)
    x = normal(3, 70, device=DEVICE)
    assert torch.equal(kernels.nf4_linear(x, moved), kernels.nf4_linear(x, q.to(DEVICE)))


@on_both_paths
def test_a_compiler_can_trace_it_without_a_break():
    q = kernels.quantize_nf4(normal(35, 96, device=DEVICE))
    compiled = torch.compile(lambda x: kernels.nf4_linear(2 * x, q).sin(), backend="aot_eager",
                             fullgraph=True)
    for rows in (3, 17):
        assert_same(compiled, lambda x: kernels.nf4_linear(2 * x, q).sin(),
                    normal(rows, 96, device=DEVICE))


@on_both_paths
def test_no_rows_no_products():
    q = kernels.quantize_nf4(normal(5, 70, device=DEVICE))
    assert kernels.nf4_linear(normal(2, 0, 70, device=DEVICE), q).shape == (2, 0, 5)


@on_both_paths
@pytest.mark.parametrize("call, said", [
    (lambda q: kernels.nf4_linear(normal(3, 69, device=DEVICE), q), "x has shape.*69.*must be 70"),
    (lambda q: kernels.nf4_linear(torch.ones(3, 70, dtype=torch.int32, device=DEVICE), q),
     "x is torch.int32"),
    (lambda q: kernels.nf4_linear(normal(3, 70, device="meta"), q), "x is on meta.*to"),
    (lambda q: kernels.quantize_nf4(torch.randn(70)), r"weight is .*\(70,\)"),
    (lambda q: kernels.quantize_nf4(torch.randn(0, 70)), r"\(0, 70\).*not empty"),
    (lambda q: kernels.quantize_nf4(torch.ones(2, 70).long()), "int64.*floats")])
def test_what_does_not_fit_is_refused_by_name(call, said):
    with pytest.raises(ValueError, match=said):
        call(kernels.quantize_nf4(normal(5, 70, device=DEVICE)))


@pytest.mark.parametrize("call, said", [
    (lambda q: kernels.nf4_linear(normal(3, 70, device=DEVICE).double(), q), "x is torch.float64"),
    (lambda q: kernels.nf4_linear(normal(17, 70, device=DEVICE).double(), q), "dtype is .*float64"),
    (lambda q: kernels.nf4_linear(normal(3, 70, device=DEVICE), q._replace(mean=q.mean.half())),
     "mean is torch.float16"),
    (lambda q: kernels.nf4_linear(normal(3, 70, device=DEVICE), q._replace(absmax=q.absmax.T)),
     "absmax has shape"),
    (lambda q: nf4_file.launch_few_rows(normal(17, 70, device=DEVICE), *q[:4]), "17 rows.*16")])
def test_what_the_kernels_do_not_serve_is_refused_by_name(call, said, path):
    if path == "triton":
        with pytest.raises(ValueError, match=said):
            call(kernels.quantize_nf4(normal(5, 70, device=DEVICE)))


# ---------------------------------------------------------------------- beside bitsandbytes

@on_both_paths
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, D", [(1, 64), (35, 128), (300, 192)])
def test_codes_absmax_and_weights_are_those_of_bitsandbytes(N, D, dtype):
    """Bit for bit. Rows of whole blocks, because theirs cross rows."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weights(N, D).to(DEVICE, dtype)
    q = kernels.quantize_nf4(w, double=False)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(state.code.cpu(), CODE)
    assert torch.equal(state.absmax, q.absmax.flatten())
    assert torch.equal(packed.flatten(), q.codes.flatten())
    theirs = functional.dequantize_4bit(packed, state)
    assert torch.equal(theirs, kernels.dequantize_nf4(q, dtype))


def test_the_absmax_of_normal_weights_are_kept_better_than_by_bitsandbytes():
    """Theirs are the nearest of 256 numbers that stand closer around 0, ours of 255 that stand
    evenly. Both take off the same mean, in blocks of 256. Errors: .0014 and .0020."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = 0.02 * torch.randn(512, 512)
    absmax = absmax_of(w)
    q = kernels.quantize_nf4(w, double=True)
    _, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4",
                                        compress_statistics=True)
    assert state.offset.item() == pytest.approx(q.mean.item(), rel=1e-6)
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    ours = nf4_file.decoded_absmax(q).flatten()
    error, their_error = ((found - absmax.flatten()).norm() for found in (ours, theirs))
    assert error < 0.8 * their_error
    assert their_error < 0.003 * absmax.norm()
