"""The specification of `vllm_sparq.ops.write.write`: one request and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import SCORING_BITS, Pages

FP16_MAX = torch.finfo(torch.float16).max


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    block_size = pages.layout.block_size
    for b in range(len(query_start_loc) - 1):
        start, stop = int(query_start_loc[b]), int(query_start_loc[b + 1])
        first = int(seq_lens[b]) - (stop - start)
        for head in range(key.shape[1]):
            for row in range(start, stop):
                block, slot = divmod(first + row - start, block_size)
                page = int(block_table[b, block])
                if slot == 0 and pages.layout.value_sum:
                    before = int(block_table[b, block - 1]) if block else None
                    _open_page(pages, page, before, head)
                pages.keys[page, head, slot] = key[row, head]
                pages.values[page, head, slot] = value[row, head]
                if slot == block_size - 1 and pages.layout.scoring:
                    _close_page(pages, page, head)


def _open_page(pages: Pages, page: int, before: int | None, head: int) -> None:
    """The page gets its first token: note the sum of V over all tokens before it."""
    if before is None:
        pages.value_sum[page, head] = 0
    else:
        pages.value_sum[page, head] = pages.value_sum[before, head] + pages.values[before, head].float().sum(0)


def _close_page(pages: Pages, page: int, head: int) -> None:
    """The page got its last token: make the channel-major copy of K."""
    keys = pages.keys[page, head].T  # [D, N]
    scoring = pages.layout.scoring
    if scoring == "model":
        pages.scoring[page, head] = keys
        return
    codes, ranges = quantize(keys.float(), SCORING_BITS[str(scoring)])
    pages.scoring[page, head] = pack_nibbles(codes) if scoring == "int4" else codes
    pages.ranges[page, head] = ranges


def quantize(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Asymmetric codes of each row.

    Args:
        x: fp32 [D, N].
        bits: of a code.

    Returns:
        codes uint8 [D, N] and ranges fp16 [D, 2] (step, zero); a code c stands for ``zero + step * c``, which is within
        half a step of x wherever fp16 can hold the range.
    """
    x = torch.where(x.isfinite(), x, 0.0)
    top = 2**bits - 1
    zero = fp16_not_above(x.amin(1))
    step = -fp16_not_above(-((x.amax(1) - zero.float()) / top))
    codes = ((x - zero.float()[:, None]) / step.float()[:, None]).nan_to_num(0.0).round().clamp(0, top)
    codes = torch.where(step[:, None] > 0, codes, 0.0)
    return codes.to(torch.uint8), torch.stack([step, zero], 1)


def dequantize(codes: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """fp32 [D, N] that ``codes`` [D, N] with ``ranges`` [D, 2] stand for."""
    step, zero = ranges.float().unbind(1)
    return zero[:, None] + step[:, None] * codes.float()


def fp16_not_above(x: torch.Tensor) -> torch.Tensor:
    """The largest finite fp16 that is not above each fp32 element; the smallest finite one where there is none."""
    x = x.clamp(-FP16_MAX, FP16_MAX)
    nearest = x.half()
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    return torch.where(nearest.float() > x, below, nearest)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[D, N] codes below 16 as [D, N/2] bytes: token n in the low nibble of byte n, token n + N/2 in the high one."""
    low, high = codes.chunk(2, dim=1)
    return low | (high << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[D, N] codes from `pack_nibbles`."""
    return torch.cat([packed & 15, packed >> 4], dim=1)
