"""K and V of whole quantized blocks, as their codes stand for them, for attention kernels that know no codes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import check_table, require


def restore(
    pages: Pages,
    block_table: torch.Tensor,
    n_blocks: torch.Tensor,
    first_pages: torch.Tensor,
    *,
    most_blocks: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """The first ``n_blocks[b]`` blocks of request b become the pages of a cache from ``first_pages[b]`` on.

    Numbers are what `vllm_sparq.ops.codec.decode_page` gives, rounded once to the model's type.

    Args:
        pages: the cache, quantized.
        block_table: int32 [B, M]; entries past the restored blocks are never read.
        n_blocks: int32 [B], whole blocks that have codes; 0 for none.
        first_pages: int32 [B].
        most_blocks: bound of ``n_blocks``, known without asking the device.
        keys, values: [P', N, G, D], dense in the last dimension; of them the named pages are written.

    Raises:
        ValueError: a shape, type or stride that does not fit, or pages without codes; the message names it.
    """
    layout, n_kv_heads = pages.layout, pages.data.shape[1]
    require(layout.quantized is not None, f"pages must be quantized, got format {layout.format!r}")
    check_table(block_table, n_blocks.shape[0], n_blocks=n_blocks, first_pages=first_pages)
    require(0 <= most_blocks <= block_table.shape[1], f"most_blocks must be in 0 .. {block_table.shape[1]}")
    for name, tensor in (("keys", keys), ("values", values)):
        shape = layout.block_size, n_kv_heads, layout.head_size
        require(
            tensor.shape[1:] == shape and tensor.dtype == layout.dtype and tensor.stride(3) == 1,
            f"{name} must be {layout.dtype} [P', {', '.join(map(str, shape))}], dense in its last dimension, "
            f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}",
        )
    run = implementation(pages.data.device.type)
    run(pages, block_table, n_blocks, first_pages, most_blocks=most_blocks, keys=keys, values=values)


def implementation(device_type: str) -> Callable[..., None]:
    """The function that runs; resolved once, when a layer is built. Of use on CUDA alone."""
    from vllm_sparq.ops.restore import reference

    if device_type == "cuda":
        from vllm_sparq.ops.restore import triton

        return triton.restore
    return reference.restore
