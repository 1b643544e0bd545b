"""Three-way kernel checks, on a GPU or else in Triton's interpreter.

`check` compares our result and torch's in the same dtype with float64: our error may be twice
torch's plus `ulps` units in the last place of the largest element.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bf16 bit patterns, not values; on a GPU the kernels never run in fp32.
DTYPES = [torch.float16, torch.bfloat16 if DEVICE == "cuda" else torch.float32]


def check(name: str, ours: torch.Tensor, same: torch.Tensor, exact: torch.Tensor, ulps=4) -> None:
    """Assert that `ours` is about as close to `exact` as `same` (torch in our dtype): see above."""
    assert ours.shape == exact.shape, (name, ours.shape, exact.shape)
    ours_err, same_err = ((t.double() - exact).abs().max().item() for t in (ours, same))
    floor = ulps * torch.finfo(ours.dtype).eps * exact.abs().max().item() + 1e-12
    assert ours_err <= 2 * same_err + floor, f"{name}: {ours_err:.3e} > 2 * {same_err:.3e}"


def gradients(fn, inputs: list, upstream: list) -> list:
    """Return the outputs of fn(*inputs) and the gradients of all inputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [g.to(o.dtype) for g, o in zip(upstream, outputs)]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, upstream))


def three_way(fn, reference, inputs: list, upstream: list) -> list:
    """Check outputs and gradients of `fn` against `reference` in its dtype and in float64."""
    ours = gradients(fn, inputs, upstream)
    same = gradients(reference, inputs, upstream)
    exact = gradients(reference, [t.double() for t in inputs], upstream)
    for i, results in enumerate(zip(ours, same, exact, strict=True)):
        check(f"result {i}", *results)
    return ours


def rand(*shape, dtype=torch.float32, seed=0, scale=1.0, shift=0.0) -> torch.Tensor:
    """Return normal random numbers, as a column slice of a wider tensor: row stride > length."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    wide = torch.randn(*shape[:-1], shape[-1] + 16 * (len(shape) > 1), generator=generator)
    return (wide * scale + shift).to(DEVICE, dtype)[..., : shape[-1]]
