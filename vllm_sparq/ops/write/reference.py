"""The specification of `vllm_sparq.ops.write.write`: one request and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import RANKING_BITS, Pages
from vllm_sparq.ops.codec import decode_page, encode_page, pack
from vllm_sparq.reads import SPAN_TOKENS

FP16_MAX = torch.finfo(torch.float16).max


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    first_positions: torch.Tensor | None = None,
) -> None:
    block_size = pages.layout.block_size
    n_new = (query_start_loc[1:] - query_start_loc[:-1]).tolist()
    firsts = [int(seq_lens[b]) - n for b, n in enumerate(n_new)]
    # Blocks that one request brings and another goes on from are written before they are gone on from.
    for b in sorted(range(len(n_new)), key=firsts.__getitem__):
        start, stop, first = int(query_start_loc[b]), int(query_start_loc[b + 1]), firsts[b]
        for head in range(key.shape[1]):
            for row in range(start, stop):
                block, slot = divmod(first + row - start, block_size)
                page = int(block_table[b, block])
                if slot == 0 and pages.layout.value_sum:
                    before = int(block_table[b, block - 1]) if block else None
                    open_page(pages, page, before, head)
                place_token(pages, block_table[b], block, slot, head, key[row, head], value[row, head])
                if pages.layout.positions:
                    position = first if first_positions is None else int(first_positions[b])
                    pages.positions[page, head, slot] = position + row - start
                if pages.layout.attention:
                    pages.attention[page, head, slot] = 0
                if slot == block_size - 1:
                    _fill_page(pages, block_table[b], block, head)


def place_token(
    pages: Pages, blocks: torch.Tensor, block: int, slot: int, head: int, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Put a token's K and V [D] into its slot, or where its block is staged; ``blocks`` is int32 [M]."""
    if pages.layout.quantized is None:
        page = int(blocks[block])
        pages.keys[page, head, slot], pages.values[page, head, slot] = key, value
    else:
        ahead, place = pages.layout.staged_at(slot)
        pages.staged[int(blocks[block + 1 + ahead]), head, place] = torch.stack([key, value])


def block_tokens(pages: Pages, blocks: torch.Tensor, block: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [N, D], in the model's dtype, of a block that is not quantized (yet); ``blocks`` is int32 [M]."""
    if pages.layout.quantized is None:
        page = int(blocks[block])
        return pages.keys[page, head], pages.values[page, head]
    ahead = blocks[block + 1 : block + 1 + pages.layout.n_staging_blocks].long()
    records = pages.staged[ahead, head].flatten(0, 1)[: pages.layout.block_size]  # [N, 2, D]
    return records[:, 0], records[:, 1]


def open_page(pages: Pages, page: int, before: int | None, head: int) -> None:
    """The page gets its first token: note the sum of V over all tokens before it."""
    if before is None:
        pages.value_sum[page, head] = 0
        return
    values = pages.values[before, head] if pages.layout.quantized is None else decode_page(pages, before, head)[1]
    pages.value_sum[page, head] = pages.value_sum[before, head] + values.float().sum(0)


def _fill_page(pages: Pages, blocks: torch.Tensor, block: int, head: int) -> None:
    """The page got its last token: quantize it, and make what ranks its tokens or spans."""
    keys, values = block_tokens(pages, blocks, block, head)
    if pages.layout.quantized is not None:
        encode_page(pages, int(blocks[block]), head, keys, values)
    if pages.layout.ranking not in (None, "representatives"):
        close_page(pages, int(blocks[block]), head, keys)


def close_page(pages: Pages, page: int, head: int, keys: torch.Tensor) -> None:
    """Make the channel-major copy, or the bounds, of the page's K, which is ``keys`` [N, D] in the model's dtype."""
    ranking = pages.layout.ranking
    if ranking == "bounds":
        pages.ranking[page, head] = span_bounds(keys)
        return
    keys = keys.T  # [D, N]
    if ranking == "model":
        pages.ranking[page, head] = keys
        return
    codes, scales = quantize(keys.float(), RANKING_BITS[str(ranking)])
    pages.ranking[page, head] = pack(codes, RANKING_BITS[str(ranking)])
    pages.scales[page, head] = scales


def span_bounds(keys: torch.Tensor) -> torch.Tensor:
    """[ceil(n / 16), 2, D]: least and largest element of each span and channel of keys [n, D], in their dtype."""
    finite = torch.where(keys.isfinite(), keys, 0.0)
    return torch.stack([torch.stack([span.amin(0), span.amax(0)]) for span in finite.split(SPAN_TOKENS)])


def quantize(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Asymmetric codes of each row.

    Args:
        x: fp32 [D, N].
        bits: of a code.

    Returns:
        codes uint8 [D, N] and scales fp16 [D, 2] (scale, zero point); a code c stands for ``zero + scale * c``, which
        is within half a scale of x wherever fp16 can hold the range.
    """
    x = torch.where(x.isfinite(), x, 0.0)
    top = 2**bits - 1
    zero = fp16_not_above(x.amin(1))
    scale = -fp16_not_above(-((x.amax(1) - zero.float()) / top))
    codes = ((x - zero.float()[:, None]) / scale.float()[:, None]).nan_to_num(0.0).round().clamp(0, top)
    codes = torch.where(scale[:, None] > 0, codes, 0.0)
    return codes.to(torch.uint8), torch.stack([scale, zero], 1)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fp32 [D, N] that ``codes`` [D, N] with ``scales`` [D, 2] stand for."""
    scale, zero = scales.float().unbind(1)
    return zero[:, None] + scale[:, None] * codes.float()


def fp16_not_above(x: torch.Tensor) -> torch.Tensor:
    """The largest finite fp16 that is not above each fp32 element; the smallest finite one where there is none."""
    x = x.clamp(-FP16_MAX, FP16_MAX)
    nearest = x.half()
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    return torch.where(nearest.float() > x, below, nearest)
