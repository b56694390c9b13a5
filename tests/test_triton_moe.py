"""
The experts of a Mixture-of-Experts layer against a loop over tokens and their pairs, in output and
every gradient: the torch path, and the Triton kernels (on a GPU, or in the interpreter).
"""
import sys
from itertools import pairwise

import pytest
import torch
from gradients import assert_same, normal, results

import kernels

launch_file = sys.modules["kernels.launch"]
moe_file = sys.modules["kernels.moe"]
ON_GPU = not launch_file.INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
PATHS = ["torch"] + ["triton"] * launch_file.INSTALLED
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N tokens, D, F, pairs of each expert, unused pairs at the end. Tiles are 16 by 32 in the
# interpreter, 128 by 128 on a GPU
SIZES = [(5, 7, 3, [1], 0), (9, 16, 32, [5, 0, 35, 1], 3), (20, 18, 37, [0, 17, 0, 16, 3, 0], 5),
         (1, 33, 17, [0, 2], 1), (6, 20, 24, [0, 0, 17], 2), (3, 5, 6, [0, 0], 0),
         (4, 5, 6, [0, 0, 0], 3)]
SIZES += [(300, 130, 72, [0, 700, 129, 3], 100)] * ON_GPU
SMALL, SPARSE = SIZES[1:3]


@pytest.fixture(autouse=True, params=PATHS)
def path(request, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(launch_file, "WANTED", request.param)
    return request.param


def layer(N, D, F, counts, unused, dtype=torch.float32, weight_dtype=None):
    """x, w13, w2, gates, and a dispatch list in which tokens occur at random: not at all, once,
    several times at one expert and at several. Activations are about 1."""
    E, P = len(counts), sum(counts) + unused
    weight_dtype = weight_dtype or dtype
    inputs = [normal(N, D, dtype=dtype), normal(E, 2 * F, D, dtype=weight_dtype) / D**0.5,
              normal(E, D, F, dtype=weight_dtype) / F**0.5, normal(P)]
    tokens = torch.randint(0, N, (P,))
    offsets = torch.tensor([0] + counts).cumsum(0)
    return [z.to(DEVICE) for z in inputs], tokens.to(DEVICE), offsets.to(DEVICE)


def experts(tokens, offsets, function=None):
    """moe_experts as a function of what it has gradients to."""
    function = function or kernels.moe_experts
    return lambda x, w13, w2, gates: function(x, w13, w2, tokens, gates, offsets)


def compare(inputs, tokens, offsets, dtype):
    """fp32 sums err by far less than 1e-5 of the largest value at these sizes. In half precision
    the longest way (gate_up, its gradient, a pair's row, the sum) rounds four times by eps / 2;
    silu's slope and its derivative make at most 1.1 times as much of an error of gate_up."""
    tolerance = 1e-5 if dtype == torch.float32 else 2.2 * torch.finfo(dtype).eps
    assert_same(experts(tokens, offsets), experts(tokens, offsets, kernels.moe_experts_reference),
                *inputs, tolerance=tolerance)


def assert_close(ours, expected):
    """Equal but for rounding: on a GPU the torch path adds in any order."""
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- against the reference

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [size for size in SIZES if sum(size[3])])
def test_experts_equal_a_loop_over_tokens_and_their_pairs(size, dtype, path):
    if path == "triton" and dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("the interpreter computes wrongly in bf16")
    compare(*layer(*size, dtype), dtype)


@pytest.mark.parametrize("size", [SMALL, SPARSE])
def test_fp32_weights_serve_half_precision_activations_and_get_fp32_gradients(size, path):
    inputs, tokens, offsets = layer(*size, torch.float16, torch.float32)
    compare(inputs, tokens, offsets, torch.float16)
    if path == "triton":                                   # the torch path rounds them as x is
        for dw in results(experts(tokens, offsets), *inputs)[2:4]:
            assert not torch.equal(dw, dw.half().float())


def test_one_token_one_pair_one_hidden_unit_by_hand():
    """silu(2) = 1.7616; times up 3, down 5, gate 0.5."""
    x, one = torch.ones(1, 1, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    y = kernels.moe_experts(x, x.new_tensor([[[2.0], [3.0]]]), x.new_tensor([[[5.0]]]), one[:1],
                            x.new_tensor([0.5]), one)
    assert y.item() == pytest.approx(0.5 * 5 * 3 * 1.7615942, rel=1e-6)


def test_offsets_may_be_32_bit_integers():
    inputs, tokens, offsets = layer(*SMALL)
    assert_close(results(experts(tokens, offsets.int()), *inputs),
                 results(experts(tokens, offsets), *inputs))


def test_gradients_of_the_torch_path_equal_finite_differences(path):
    if path == "triton":
        pytest.skip("kernels compute in fp32")
    inputs, tokens, offsets = layer(4, 3, 2, [3, 0, 4], 1)
    inputs = [z.double().requires_grad_() for z in inputs]
    assert torch.autograd.gradcheck(experts(tokens, offsets), inputs, nondet_tol=1e-12)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch < 2.10")
def test_torchs_grouped_matmul_gives_the_same_where_it_is_used(path, monkeypatch):
    """It serves CPUs too, in fp32 rows of multiples of 4. What GPUs leave as memory had it, unused
    rows and the gradients of experts without pairs, is NaN here."""
    if path == "triton" or ON_GPU:
        pytest.skip("a GPU uses it in bf16, in the test above")
    real = torch.nn.functional.grouped_mm

    def grouped_mm(a, b, offs):
        out, starts = real(a, b, offs=offs), torch.nn.functional.pad(offs[:-1], (1, 0))
        if b.dim() == 3:
            out[offs[-1]:] = torch.nan
        else:
            out[starts == offs] = torch.nan
        return out
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    monkeypatch.setattr(moe_file, "grouped_mm_serves", lambda a, b: True)
    compare(*layer(*SMALL), torch.float32)


# ---------------------------------------------------------------------- properties

@pytest.mark.parametrize("size", SIZES)
def test_what_is_in_no_pair_gets_exact_zeros(size):
    """Tokens: output and gradient; experts: weight gradients; unused pairs: the gate's gradient."""
    inputs, tokens, offsets = layer(*size)
    y, dx, dw13, dw2, dgates = results(experts(tokens, offsets), *inputs)
    used, counts = offsets[-1], offsets.diff()
    alone = torch.ones(size[0], dtype=torch.bool, device=DEVICE)
    alone[tokens[:used]] = False
    assert not y[alone].any() and not dx[alone].any() and not dgates[used:].any()
    assert not dw13[counts == 0].any() and not dw2[counts == 0].any()
    assert y[~alone].any(-1).all() and dx[~alone].any(-1).all()
    assert all(dw[counts > 0].flatten(1).any(-1).all() for dw in (dw13, dw2))


def test_unused_pairs_have_no_influence():
    (*inputs, gates), tokens, offsets = layer(*SMALL)
    before = results(experts(tokens, offsets), *inputs, gates)
    used = offsets[-1]
    tokens, gates = tokens.clone(), gates.clone()
    tokens[used:], gates[used:] = (tokens[used:] + 7) % len(inputs[0]), 1e4
    assert_close(results(experts(tokens, offsets), *inputs, gates), before)


def reordered(order, inputs, tokens):
    return [*inputs[:3], inputs[3][order]], tokens[order]


def test_the_order_of_an_experts_pairs_changes_nothing_but_rounding():
    inputs, tokens, offsets = layer(*SMALL)
    bounds = [*offsets.tolist(), len(tokens)]
    order = torch.cat([first + torch.randperm(end - first) for first, end in pairwise(bounds)])
    y, dx, dw13, dw2, dgates = results(experts(tokens, offsets), *inputs)
    inputs, tokens = reordered(order, inputs, tokens)
    assert_close(results(experts(tokens, offsets), *inputs), (y, dx, dw13, dw2, dgates[order]))


def test_the_order_of_experts_changes_nothing_but_rounding():
    inputs, tokens, offsets = layer(*SPARSE)
    bounds, permutation = offsets.tolist(), [3, 5, 1, 0, 4, 2]
    parts = [torch.arange(bounds[e], bounds[e + 1]) for e in permutation]
    order = torch.cat([*parts, torch.arange(bounds[-1], len(tokens))])
    y, dx, dw13, dw2, dgates = results(experts(tokens, offsets), *inputs)
    (x, w13, w2, gates), tokens = reordered(order, inputs, tokens)
    offsets = torch.tensor([0] + [len(part) for part in parts], device=DEVICE).cumsum(0)
    assert_close(results(experts(tokens, offsets), x, w13[permutation], w2[permutation], gates),
                 (y, dx, dw13[permutation], dw2[permutation], dgates[order]))


def test_equal_experts_that_serve_every_token_by_gates_that_sum_to_one_are_one_dense_layer():
    N, D, F, E = 10, 12, 20, 3
    (x, w13, w2, _), _, _ = layer(N, D, F, [1], 0)
    shares = normal(N, E, device=DEVICE).softmax(-1)
    tokens = torch.arange(N, device=DEVICE).repeat(E)
    y = kernels.moe_experts(x, w13.expand(E, -1, -1), w2.expand(E, -1, -1), tokens,
                            shares.T.flatten(), N * torch.arange(E + 1, device=DEVICE))
    dense = kernels.swiglu_reference(x @ w13[0].T) @ w2[0].T
    assert_close([y], [dense])


def test_frozen_weights_get_no_gradient_and_change_no_other():
    (x, w13, w2, gates), tokens, offsets = layer(*SMALL)
    function = experts(tokens, offsets)
    y, dx, _, _, dgates = results(function, x, w13, w2, gates)
    assert_close(results(lambda x, gates: function(x, w13, w2, gates), x, gates), (y, dx, dgates))
    gates.requires_grad_()
    function(x, w13, w2, gates).sum().backward()
    assert w13.grad is None and w2.grad is None and gates.grad is not None


@pytest.mark.parametrize("size", [SMALL, SIZES[0]])
def test_inputs_and_saved_tensors_are_never_overwritten(size):
    inputs, tokens, offsets = layer(*size)
    before = [z.clone() for z in (*inputs, tokens, offsets)]
    x = inputs[0].requires_grad_()
    y = kernels.moe_experts(*inputs[:3], tokens, inputs[3], offsets).sum()
    first, = torch.autograd.grad(y, x, retain_graph=True)
    second, = torch.autograd.grad(y, x)
    assert_close([second], [first])
    assert all(map(torch.equal, (*inputs, tokens, offsets), before))


def test_a_compiler_can_trace_it_without_a_break():
    """aot_eager: dynamo and autograd as torch.compile runs them, without the C++."""
    inputs, tokens, offsets = layer(*SMALL)

    def doubled(x, w13, w2, gates):
        return 2 * kernels.moe_experts(x * 2, w13, w2, tokens, gates.abs(), offsets)
    assert_same(torch.compile(doubled, backend="aot_eager", fullgraph=True), doubled, *inputs)


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to wait for")
def test_the_host_never_waits_for_the_gpu(path):
    if path == "torch":
        pytest.skip("without grouped_mm it reads the offsets")
    inputs, tokens, offsets = layer(*SIZES[-1], torch.bfloat16)
    inputs = [z.requires_grad_() for z in inputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(tokens, offsets)(*inputs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("name, change", [
    ("x", lambda x: x[0]), ("w13", lambda w: w[0]), ("w13", lambda w: w[:, 1:]),
    ("w13", lambda w: w[:, :, 1:]), ("w2", lambda w: w[1:]), ("w2", lambda w: w.mT),
    ("tokens", lambda t: t.int()), ("gates", lambda g: g[1:]), ("gates", lambda g: g.half()),
    ("offsets", lambda o: o[1:]), ("offsets", lambda o: o.float())])
def test_arguments_that_do_not_fit_are_refused_by_name(name, change):
    (x, w13, w2, gates), tokens, offsets = layer(*SMALL)
    arguments = {"x": x, "w13": w13, "w2": w2, "tokens": tokens, "gates": gates, "offsets": offsets}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=rf"{name} (has shape|is|\().*must be"):
        kernels.moe_experts(**arguments)


def test_kernels_refuse_double_precision(path):
    if path == "torch":
        pytest.skip("the torch path takes it")
    inputs, tokens, offsets = layer(*SMALL)
    with pytest.raises(ValueError, match="x is torch.float64"):
        experts(tokens, offsets)(*(z.double() for z in inputs))
