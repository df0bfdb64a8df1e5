"""V rotated before it is stored in few bits, and attention's output turned back.

A channel that stands out makes the range of its whole group wide, and codes of 2 bits coarse. The Walsh-Hadamard
transform of n neighbouring channels spreads it over n, and what is left has the range of a bell curve. Attention is
linear in V, so a layer rotates the V of its new tokens, works on rotated V alone (staged or in codes, sums and means
too), and turns its output back: kernels know nothing of it. Rotations before quantizing: QuIP# (arXiv 2402.04396),
QuaRot (arXiv 2404.00456).
"""

from __future__ import annotations

import functools

import torch


def transform_size(head_size: int) -> int:
    """n: the largest power of two that divides the head size; a head is D / n transforms side by side."""
    return head_size & -head_size


@functools.cache
def _signs(n: int, factor: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n, n] of one magnitude, Sylvester's Hadamard matrix times ``factor``; symmetric."""
    i = torch.arange(n, device="cpu")  # where a model is built on another device by default, or on none
    bits = i[:, None] & i
    odd = torch.zeros_like(bits)
    for shift in range(n.bit_length()):
        odd ^= bits >> shift & 1
    return ((1 - 2 * odd) * factor).to(dtype=dtype, device=device)


def _factors(n: int) -> tuple[float, float]:
    """Powers of two with the product 1 / n, the first near 1 / sqrt(n): in any type they undo each other exactly."""
    there = 2.0 ** -(n.bit_length() // 2)
    return there, 1 / (n * there)


def _transformed(x: torch.Tensor, factor: float) -> torch.Tensor:
    n = transform_size(x.shape[-1])
    result: torch.Tensor = x.unflatten(-1, (-1, n)) @ _signs(n, factor, x.dtype, x.device)
    return result.flatten(-2)


def rotated(value: torch.Tensor) -> torch.Tensor:
    """V [..., D] as it is stored, in its own type."""
    return _transformed(value, _factors(transform_size(value.shape[-1]))[0])


def turned_back(output: torch.Tensor) -> torch.Tensor:
    """Means [..., D] of rotated V as means of V: undoes `rotated`."""
    return _transformed(output, _factors(transform_size(output.shape[-1]))[1])


def prepare_rotation(head_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Make the matrices now, since they come from the host, which a captured graph cannot ask."""
    turned_back(rotated(torch.zeros(head_size, dtype=dtype, device=device)))
