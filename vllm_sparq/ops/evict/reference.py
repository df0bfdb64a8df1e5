"""The specification of `vllm_sparq.ops.evict.evict`: one request and one KV head at a time."""

from __future__ import annotations

from typing import assert_never

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.codec import decode_page, dequantize, pack, quantize, unpack
from vllm_sparq.ops.write.reference import block_tokens, close_page, open_page
from vllm_sparq.retention import Rank


def evict(
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kept_lens: torch.Tensor,
    recent_from: torch.Tensor,
    *,
    sinks: int,
    rank: Rank,
    most_kept: int | None = None,
) -> None:
    for b in range(len(seq_lens)):
        n_held, n_kept = int(seq_lens[b]), int(kept_lens[b])
        if n_kept == n_held:
            continue
        for head in range(pages.data.shape[1]):
            slots = request_slots(pages, block_table[b], n_held)
            staying = survivors(pages, slots, head, n_kept, sinks=sinks, recent_from=int(recent_from[b]), rank=rank)
            to, source = (~staying[:n_kept]).nonzero()[:, 0], staying[n_kept:].nonzero()[:, 0] + n_kept
            move_tokens(pages, block_table[b], head, source, to, n_held)
            _remake(pages, block_table[b], head, to, n_kept)


def request_slots(pages: Pages, blocks: torch.Tensor, n_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and place in it, int64 [n_slots] each, of a request's slots; ``blocks`` is int32 [M]."""
    slots = torch.arange(n_slots, device=pages.data.device)
    return blocks.long()[slots // pages.layout.block_size], slots % pages.layout.block_size


def survivors(
    pages: Pages,
    slots: tuple[torch.Tensor, torch.Tensor],
    head: int,
    n_kept: int,
    *,
    sinks: int,
    recent_from: int,
    rank: Rank,
) -> torch.Tensor:
    """Step 1: bool [S], who stays."""
    page, place = slots
    positions = pages.positions[page, head, place]
    if rank == "attention":
        ranks = pages.attention[page, head, place].nan_to_num(-torch.inf)
    elif rank == "age":
        ranks = positions.float()
    else:
        assert_never(rank)
    ranks = torch.where((positions < sinks) | (positions >= recent_from), torch.inf, ranks)
    by_age = positions.sort(stable=True).indices
    order = by_age[ranks[by_age].sort(descending=True, stable=True).indices]
    staying = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
    staying[order[:n_kept]] = True
    return staying


def move_tokens(
    pages: Pages, blocks: torch.Tensor, head: int, source: torch.Tensor, to: torch.Tensor, n_held: int
) -> None:
    """Step 2: the tokens in slots ``source`` take the slots ``to``; int64 [n] each, of one request."""
    layout = pages.layout
    block_size, newest = layout.block_size, (n_held - 1) // layout.block_size
    arriving: dict[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
    for old, new in zip(source.tolist(), to.tolist(), strict=True):
        (old_block, old_slot), (block, slot) = divmod(old, block_size), divmod(new, block_size)
        page, target = int(blocks[old_block]), int(blocks[block])
        for name in ("positions", "attention") if layout.attention else ("positions",):
            getattr(pages, name)[target, head, slot] = getattr(pages, name)[page, head, old_slot]
        if layout.quantized is None or old_block == newest:
            keys, values = block_tokens(pages, blocks, old_block, head)
        else:
            keys, values = (x.to(layout.dtype) for x in decode_page(pages, page, head))
        arriving.setdefault(block, {})[slot] = keys[old_slot].clone(), values[old_slot].clone()
        if layout.quantized is None:
            pages.keys[target, head, slot], pages.values[target, head, slot] = keys[old_slot], values[old_slot]
        else:
            _move_codes(pages, (page, old_slot), (target, slot), head, None if old_block != newest else (keys, values))
    if layout.channel_keys:
        for block, tokens in arriving.items():
            _requantize_keys(pages, int(blocks[block]), head, {slot: key for slot, (key, _) in tokens.items()})


def _move_codes(
    pages: Pages,
    source: tuple[int, int],
    to: tuple[int, int],
    head: int,
    staged: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Token-major codes and scales from one (page, slot) to another; made now where the block is ``staged``."""
    layout = pages.layout
    for i, name in enumerate(("key", "value")):
        if name == "key" and layout.channel_keys:
            continue
        codes, scales = getattr(pages, f"{name}_codes"), getattr(pages, f"{name}_scales")
        if staged is None:
            new_codes, new_scales = codes[source[0], head, source[1]], scales[source[0], head, source[1]]
        else:
            coding = layout.coding(name)
            unpacked, rows = quantize(staged[i][source[1] : source[1] + 1], coding, layout.group(name))
            new_codes, new_scales = pack(unpacked, coding.bits)[0], rows[0]
        codes[to[0], head, to[1]], scales[to[0], head, to[1]] = new_codes.clone(), new_scales.clone()


def _requantize_keys(pages: Pages, page: int, head: int, arriving: dict[int, torch.Tensor]) -> None:
    """Channel-major K: new codes for every group of tokens that one of ``arriving`` (slot -> K [D]) joins."""
    layout = pages.layout
    coding, size = layout.coding("key"), layout.group("key")
    keys = dequantize(pages.key_codes[page, head], pages.key_scales[page, head], coding).to(layout.dtype)  # [D, N]
    for slot, key in arriving.items():
        keys[:, slot] = key
    new_codes, new_scales = quantize(keys, coding, size)
    codes, scales = unpack(pages.key_codes[page, head], coding.bits), pages.key_scales[page, head]
    for group in sorted({slot // size for slot in arriving}):
        tokens = slice(group * size, (group + 1) * size)
        codes[:, tokens], scales[:, group] = new_codes[:, tokens], new_scales[:, group]
    pages.key_codes[page, head] = pack(codes, coding.bits)


def _remake(pages: Pages, blocks: torch.Tensor, head: int, replaced: torch.Tensor, n_kept: int) -> None:
    """Step 3: what pages derive from tokens, where those in the slots ``replaced`` are new."""
    layout = pages.layout
    changed = sorted({slot // layout.block_size for slot in replaced.tolist()})
    for block in changed:
        if layout.ranking is not None and (block + 1) * layout.block_size <= n_kept:
            page = int(blocks[block])
            if layout.quantized is None:
                keys = pages.keys[page, head]
            else:
                keys = decode_page(pages, page, head)[0].to(layout.dtype)
            close_page(pages, page, head, keys)
    if changed and layout.value_sum:
        for block in range(changed[0] + 1, (n_kept - 1) // layout.block_size + 1):
            open_page(pages, int(blocks[block]), int(blocks[block - 1]), head)
