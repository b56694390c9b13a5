"""Comparing a function with its reference, in outputs and every gradient."""
import torch


def normal(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=torch.float32).to(device, dtype)


def packed(B: int, T: int) -> torch.Tensor:
    """(B, T) document numbers, up to three documents in each row."""
    return torch.randint(0, 3, (B, T)).sort(-1).values


def results(function, *inputs):
    """Outputs of function and, for random upstream gradients, the gradients of its inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def assert_same(function, reference, *inputs, tolerance=1e-5):
    """Largest difference below `tolerance` times the largest value, for outputs and gradients."""
    for ours, expected in zip(results(function, *inputs), results(reference, *inputs), strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
