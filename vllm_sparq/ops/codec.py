"""How a full block becomes codes, and what the codes stand for: the specification of the quantized block formats.

Plain torch, one page at a time. Ranges are kept in the model's own type, so the least element of a group is exact.
"""

from __future__ import annotations

import torch

from vllm_sparq.formats import Coding
from vllm_sparq.layout import Pages


def encode_page(pages: Pages, page: int, head: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Quantize the N tokens of a full block, K and V [N, D] in the model's dtype, into its page."""
    layout = pages.layout
    keys = keys.T if layout.channel_keys else keys
    for name, rows in (("key", keys), ("value", values)):
        coding = layout.coding(name)
        codes, scales = quantize(rows, coding, layout.group(name))
        getattr(pages, f"{name}_codes")[page, head] = pack(codes, coding.bits)
        getattr(pages, f"{name}_scales")[page, head] = scales


def decode_page(pages: Pages, page: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, fp32 [N, D], that the codes of a full block stand for."""
    layout = pages.layout
    keys = dequantize(pages.key_codes[page, head], pages.key_scales[page, head], layout.coding("key"))
    values = dequantize(pages.value_codes[page, head], pages.value_scales[page, head], layout.coding("value"))
    return (keys.T if layout.channel_keys else keys), values


def quantize(x: torch.Tensor, coding: Coding, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the groups of each row.

    With scale and zero point, ``zero`` is the least element and ``scale`` the smallest number of x's type that is not
    below ``(max - zero) / (2**bits - 1)``; a code is ``clamp(round_half_even((x - zero) / scale), 0, 2**bits - 1)``.
    With ``midpoints`` the scale is not below ``(max - min) / 2**bits``, the width of a cell, and ``zero`` the middle of
    the first, ``min + scale / 2`` rounded to x's type. With a scale alone it is not below ``max |x| / 127``, and a code
    is ``clamp(round_half_even(x / scale), -127, 127)``. All in fp32.

    Codes stand for x within half a scale (and what a middle was rounded by), and exactly where all elements of a group
    are equal: there the scale is 0 and ``zero`` the element, or the scale its magnitude and the code its sign. A group
    with an element that is infinite or NaN, or with a range beyond x's type, reads as NaN as a whole: its scales are
    NaN and its codes 0.

    Args:
        x: [rows, n] in the model's dtype.
        coding: bits, and which scales.
        group: elements of a group; divides n.

    Returns:
        codes [rows, n], uint8 (int8 codes as their bytes), and scales [rows, n / group, 2 | 1] of x's type.
    """
    groups = x.float().unflatten(-1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    constant = low == high
    if coding.scale_numbers == 1:
        largest = torch.maximum(-low, high)
        scale = torch.where(constant, largest, not_below(largest / 127, x.dtype))
        codes, scales = (groups / scale).round().clamp(-127, 127), [scale]
    else:
        scale = not_below((high - low) / (2**coding.bits - (not coding.midpoints)), x.dtype)
        zero = (low + scale / 2).to(x.dtype).float() if coding.midpoints else low
        codes, scales = ((groups - zero) / scale).round().clamp(0, 2**coding.bits - 1), [scale, zero]
    broken = ~(groups.isfinite().all(-1, keepdim=True) & scale.isfinite())
    codes = torch.where(broken | (scale == 0), 0.0, codes)
    scales = [torch.where(broken, torch.nan, number).to(x.dtype) for number in scales]
    return codes.flatten(-2).to(torch.int16).to(torch.uint8), torch.cat(scales, -1)


def dequantize(packed: torch.Tensor, scales: torch.Tensor, coding: Coding) -> torch.Tensor:
    """fp32 [rows, n] that packed codes [rows, n * bits/8] with scales [rows, n / g, 2 | 1] stand for."""
    codes = unpack(packed, coding.bits)
    if coding.scale_numbers == 1:
        codes = codes.view(torch.int8)
    groups = codes.float().unflatten(-1, (scales.shape[-2], -1))
    numbers = scales.float()
    zero = numbers[..., 1:] if coding.scale_numbers == 2 else 0.0
    rows: torch.Tensor = (zero + numbers[..., :1] * groups).flatten(-2)
    return rows


def not_below(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest number of ``dtype`` that is not below each fp32 element x >= 0, in fp32."""
    nearest = x.to(dtype)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest.float() < x, above, nearest).float()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n] codes as [rows, n * bits/8] bytes: byte i holds code i of each of 8 / bits runs, the first lowest."""
    packed = torch.zeros_like(codes[:, : codes.shape[1] * bits // 8])
    for i, run in enumerate(codes.chunk(8 // bits, dim=1)):
        packed |= run << (bits * i)
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n] codes from `pack`."""
    runs = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(runs, dim=1)
