"""What every op checks about its arguments, said once. Messages carry the name, the rule and the value."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def check_heads(name: str, tensor: torch.Tensor, pages: Pages, *, multiple_of_kv_heads: bool) -> None:
    """``tensor`` is [rows, heads, D] in the pages' dtype, dense in its last dimension, heads fitting the pages."""
    n_kv_heads, head_size = pages.data.shape[1], pages.layout.head_size
    heads = f"a multiple of {n_kv_heads}" if multiple_of_kv_heads else str(n_kv_heads)
    fits = (
        tensor.dim() == 3
        and tensor.shape[2] == head_size
        and (tensor.shape[1] % n_kv_heads == 0 if multiple_of_kv_heads else tensor.shape[1] == n_kv_heads)
    )
    require(fits, f"{name} must be [rows, heads, {head_size}] with heads {heads}, got shape {tuple(tensor.shape)}")
    require(tensor.stride(2) == 1, f"{name} must be dense in its last dimension, got strides {tensor.stride()}")
    require(
        tensor.dtype == pages.layout.dtype,
        f"{name} must be {pages.layout.dtype} as the pages are, got {tensor.dtype}",
    )


def check_starts(query_start_loc: torch.Tensor) -> int:
    """``query_start_loc`` is int32 [B + 1]; returns B."""
    require(
        query_start_loc.dtype == torch.int32
        and query_start_loc.dim() == 1
        and query_start_loc.shape[0] >= 1
        and query_start_loc.is_contiguous(),
        f"query_start_loc must be a dense int32 vector of B + 1 entries, "
        f"got {query_start_loc.dtype} {tuple(query_start_loc.shape)}",
    )
    return query_start_loc.shape[0] - 1


def check_table(block_table: torch.Tensor, n_requests: int, **per_request: torch.Tensor) -> None:
    """``block_table`` is int32 [>= B, M]; each of ``per_request`` is int32 with at least B entries."""
    require(
        block_table.dtype == torch.int32 and block_table.dim() == 2 and block_table.stride(1) == 1,
        f"block_table must be int32 [B, M] with dense rows, got {block_table.dtype} {tuple(block_table.shape)}",
    )
    require(
        block_table.shape[0] >= n_requests,
        f"block_table has {block_table.shape[0]} rows for {n_requests} requests",
    )
    for name, tensor in per_request.items():
        require(
            tensor.dtype == torch.int32 and tensor.dim() == 1 and tensor.is_contiguous(),
            f"{name} must be a dense int32 vector, got {tensor.dtype} {tuple(tensor.shape)}",
        )
        require(tensor.shape[0] >= n_requests, f"{name} has {tensor.shape[0]} entries for {n_requests} requests")


def check_softmax(query: torch.Tensor, sinks: torch.Tensor | None, soft_cap: float | None) -> None:
    """``sinks`` is None or fp32 [H] for a query [rows, H, D], ``soft_cap`` None or positive."""
    require(soft_cap is None or soft_cap > 0, f"soft_cap must be positive or None, got {soft_cap}")
    require(
        sinks is None
        or (sinks.dtype == torch.float32 and tuple(sinks.shape) == query.shape[1:2] and sinks.is_contiguous()),
        f"sinks must be a dense float32 vector of {query.shape[1]} entries, one per query head, got "
        f"{None if sinks is None else (sinks.dtype, tuple(sinks.shape))}",
    )
