"""Other people's dense attention over the same tokens, the best that is installed: what our times stand beside.

vLLM's own FlashAttention where vLLM is, of the version that vLLM itself would use, over our pages as they are or over
bfloat16 pages of the same sizes; if that does not run, its other versions; else flash-attn, else flashinfer, else
PyTorch's SDPA. The last three get K and V as they like them best: contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from vllm_sparq.benchmarks.gpu.timing import Step

VLLM_VERSIONS = (3, 4, 2)
"""Of FlashAttention, as vLLM counts them; in this order where vLLM's own choice does not run."""

PAGE = 16
"""Tokens of flashinfer's pages."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What a rival is asked: T rows, evenly of B requests, over S tokens each, the rows' own the last of them.

    Attributes:
        query: [T, H, D].
        n_kv_heads: G.
        context: S.
        table: int32 [B, M], or None for tensors of the rival's own.
        keys, values: [P, N, G, D], pages that the table points into.
    """

    query: torch.Tensor
    n_kv_heads: int
    requests: int
    context: int
    table: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """New tokens of a request."""
        return len(self.query) // self.requests

    def contiguous(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [B, S, G, D] of random tokens."""
        shape = self.requests, self.context, self.n_kv_heads, self.query.shape[2]
        key, value = (torch.empty(shape, dtype=self.query.dtype, device=self.query.device).normal_() for _ in range(2))
        return key, value


def vllm_version(head_size: int) -> int:
    """The version of FlashAttention that vLLM's own backend uses on this device, without a model's configuration.

    Raises:
        ImportError: there is no vLLM, or none with FlashAttention.
        RuntimeError: vLLM uses none here.
    """
    from vllm import vllm_flash_attn  # noqa: F401  says why, where the wheel has none
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=head_size)
    if version is None:
        raise RuntimeError("vLLM uses no FlashAttention on this device")
    return version


def vllm_flash(wanted: Attention, *, version: int) -> tuple[str, Step]:
    """A version of vLLM's copy of FlashAttention, paged.

    Raises:
        ImportError: there is no vLLM, or none with FlashAttention.
        RuntimeError: the wheel or the device has no such version.
    """
    from vllm import vllm_flash_attn

    if not vllm_flash_attn.is_fa_version_supported(version):
        raise RuntimeError(vllm_flash_attn.fa_version_unsupported_reason(version))
    query, device = wanted.query, wanted.query.device
    starts = torch.arange(wanted.requests + 1, dtype=torch.int32, device=device) * wanted.rows
    lens = torch.full((wanted.requests,), wanted.context, dtype=torch.int32, device=device)
    keys, values, table = wanted.keys, wanted.values, wanted.table
    if keys is None or values is None or table is None:
        n = 128
        blocks = -(-wanted.context // n)
        shape = wanted.requests * blocks, n, wanted.n_kv_heads, query.shape[2]
        keys, values = (torch.empty(shape, dtype=query.dtype, device=device).normal_() for _ in range(2))
        table = torch.randperm(shape[0], device=device).int().view(wanted.requests, blocks)
    out = torch.empty_like(query)
    return f"vLLM FlashAttention {version}", lambda: vllm_flash_attn.flash_attn_varlen_func(
        query,
        keys,
        values,
        max_seqlen_q=wanted.rows,
        cu_seqlens_q=starts,
        max_seqlen_k=wanted.context,
        seqused_k=lens,
        block_table=table,
        causal=True,
        fa_version=version,
        out=out,
    )


def flash_attn(wanted: Attention) -> tuple[str, Step]:
    """The package flash-attn."""
    from flash_attn import flash_attn_with_kvcache

    key, value = wanted.contiguous()
    query = wanted.query.unflatten(0, (wanted.requests, wanted.rows))
    lens = torch.full((wanted.requests,), wanted.context, dtype=torch.int32, device=query.device)
    return "flash-attn", lambda: flash_attn_with_kvcache(query, key, value, cache_seqlens=lens, causal=True)


def flashinfer(wanted: Attention) -> tuple[str, Step]:
    """The package flashinfer, paged."""
    import flashinfer as package

    key, value = wanted.contiguous()
    query, device, (b, s, g, d) = wanted.query, key.device, key.shape
    paged = tuple(t.reshape(-1, PAGE, g, d) for t in (key, value))
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    ids = torch.arange(b * s // PAGE, dtype=torch.int32, device=device)
    indptr = torch.arange(b + 1, dtype=torch.int32, device=device) * (s // PAGE)
    last, types = torch.full_like(indptr[1:], PAGE), dict(q_data_type=query.dtype, kv_data_type=key.dtype)
    if wanted.rows > 1:
        prompt = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        starts = torch.arange(b + 1, dtype=torch.int32, device=device) * wanted.rows
        prompt.plan(starts, indptr, ids, last, query.shape[1], g, d, PAGE, causal=True, **types)
        return "flashinfer", lambda: prompt.run(query, paged)
    step = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    step.plan(indptr, ids, last, query.shape[1], g, d, PAGE, **types)
    return "flashinfer", lambda: step.run(query, paged)


def sdpa(wanted: Attention) -> tuple[str, Step]:
    """PyTorch's own, which is always there; slow for decodes, so a ratio to it says little."""
    from torch.nn.attention.bias import causal_lower_right

    key, value = (t.transpose(1, 2) for t in wanted.contiguous())  # [B, G, S, D]
    query = wanted.query.unflatten(0, (wanted.requests, wanted.rows)).transpose(1, 2)  # [B, H, T, D]
    mask = causal_lower_right(wanted.rows, wanted.context) if wanted.rows > 1 else None
    run = torch.nn.functional.scaled_dot_product_attention
    return "sdpa", lambda: run(query, key, value, attn_mask=mask, enable_gqa=True)


Make = Callable[[Attention], tuple[str, Step]]

OTHERS: dict[str, Make] = {"flash_attn": flash_attn, "flashinfer": flashinfer, "sdpa": sdpa}


def candidates(wanted: Attention, absent: dict[str, str]) -> Iterator[tuple[str, Make]]:
    """All rivals by name, the best first; what vLLM has none of, or why it names none, goes into ``absent``."""
    versions = list(VLLM_VERSIONS)
    try:
        own = vllm_version(wanted.query.shape[2])
        versions = [own, *(version for version in versions if version != own)]
    except ImportError as error:
        absent["vllm_flash"] = reason(error)
        versions = []
    except Exception as error:
        if is_fatal(error):
            raise
        absent["vllm_flash"] = reason(error)
    yield from ((f"vllm_flash {version}", partial(vllm_flash, version=version)) for version in versions)
    yield from OTHERS.items()


def first_rival(wanted: Attention, ready: Callable[[Step], Step]) -> tuple[str, Step, dict[str, str]]:
    """Name and step of the best that is installed and runs, and why each before it does not.

    Args:
        ready: makes of a step what is timed; it raises where the step does not run.

    Raises:
        RuntimeError: none runs.
    """
    absent: dict[str, str] = {}
    for key, make in candidates(wanted, absent):
        try:
            name, step = make(wanted)
            return name, ready(step), absent
        except Exception as error:
            if is_fatal(error):
                raise
            absent[key] = reason(error)
    raise RuntimeError(f"no rival runs: {absent}")


def reason(error: Exception) -> str:
    """Why there is no rival, in a line."""
    return f"{type(error).__name__}: {error}"[:200]


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process after an error, as after an access to no memory of ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)
