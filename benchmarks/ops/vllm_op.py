"""vLLM's own dense attention op, for the instruction set that ours was chosen for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch

from vllm_sparq.benchmarks.ops.cell import Call, Cell, Tensors
from vllm_sparq.ops import native
from vllm_sparq.ops.huge_pages import advise_huge_pages

VLLM_ASKS = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")
"""The questions about the CPU, of ``torch.cpu``, by which vLLM chooses its library and its attention's kernel."""

VLLM_SEES = {
    "avx2": (False, False, False),
    "avx512": (True, False, False),
    "avx512_vnni": (True, False, False),
    "avx512_bf16": (True, True, False),
}
"""The answers by which vLLM takes its kernels for one of our instruction sets."""


@contextmanager
def same_instruction_set() -> Iterator[None]:
    """Inside, vLLM loads its kernels for the instruction set that ``VLLM_SPARQ_ISA`` chose of ours, if it did.

    It asks torch what the CPU has, once, and would take the best.
    """
    with ExitStack() as stack:
        for name, has in zip(VLLM_ASKS, VLLM_SEES.get(os.environ.get(native.OVERRIDE, ""), ()), strict=False):
            if not has:
                stack.enter_context(mock.patch.object(torch.cpu, name, return_value=False))
        yield


def vllm_library() -> str:
    """The library of vLLM's kernels that is loaded here, by its name."""
    found = re.search(r"/vllm/(_C\w*)\.abi3\.so", Path("/proc/self/maps").read_text())
    return found[1] if found else "none"


def vllm_kernel(cell: Cell, block_size: int) -> str:
    """The kernel that vLLM's attention takes for such a layer, ready to be called.

    Linux lets a process use AMX's registers once it has asked for them. In an engine the linear layers have.
    """
    with same_instruction_set():
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = str(_get_attn_isa(cell.dtype, block_size, cell.head_dim))
    if isa == "amx" and not torch.cpu._init_amx():
        raise RuntimeError("vLLM's attention would use AMX here, which Linux does not grant: take --dtype fp16 or fp32")
    return isa


def vllm_calls(t: Tensors, splits: Sequence[bool] = (False, True)) -> Iterator[Call]:
    """vLLM's own op at every setting worth trying: block sizes, and splitting a context over threads or not.

    It reads a cache of random numbers: its time does not depend on them.
    """
    with same_instruction_set():
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        current_platform.import_kernels()
    cell = t.cell
    if cell.head_dim not in CPUAttentionBackend.get_supported_head_sizes():
        return
    out = torch.empty_like(t.query)
    for block_size in (32, 64, 128, 256):
        n_blocks = -(-cell.context // block_size)
        cache = torch.empty(cell.batch * n_blocks, cell.kv_heads, 2 * block_size, cell.head_dim, dtype=cell.dtype)
        advise_huge_pages(cache)
        cache[:] = torch.randn(cache.shape[1:], dtype=cell.dtype)
        keys, values = cache.chunk(2, dim=2)
        table = torch.randperm(len(cache), dtype=torch.int32).view(cell.batch, n_blocks)
        isa = vllm_kernel(cell, block_size)
        for split in splits:
            schedule = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=cell.batch,
                num_heads=cell.heads,
                num_kv_heads=cell.kv_heads,
                head_dim=cell.head_dim,
                seq_lens=t.seq_lens,
                dtype=cell.dtype,
                query_start_loc=t.query_start_loc,
                causal=True,
                sliding_window_size=-1,
                isa=isa,
                enable_kv_split=split,
            )

            def run(
                keys: torch.Tensor = keys,
                values: torch.Tensor = values,
                table: torch.Tensor = table,
                schedule: torch.Tensor = schedule,
            ) -> None:
                ops.cpu_attention_with_kv_cache(
                    query=t.query,
                    key_cache=keys,
                    value_cache=values,
                    output=out,
                    query_start_loc=t.query_start_loc,
                    seq_lens=t.seq_lens,
                    scale=cell.scale,
                    causal=True,
                    alibi_slopes=None,
                    sliding_window=-1,
                    block_table=table,
                    softcap=0,
                    scheduler_metadata=schedule,
                    s_aux=None,
                )

            setting = f"blocks of {block_size}, {'split' if split else 'no split'}"
            yield Call(f"CPU_ATTN {isa} of {vllm_library()}, {setting}", run)
