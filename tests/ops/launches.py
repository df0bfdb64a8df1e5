"""What a call of an op launches and how much scratch it takes on a GPU: noted on the CPU, nothing is run.

python -m tests.ops.launches    the table of docs/gpu.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from unittest import mock

import torch

from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.dense_decode.triton import dense_decode
from vllm_sparq.ops.evict.triton import evict
from vllm_sparq.ops.quest_decode.triton import quest_decode
from vllm_sparq.ops.sparq_decode.triton import sparq_decode
from vllm_sparq.ops.triton_common import launch
from vllm_sparq.ops.triton_common.merge import merge_kernel
from vllm_sparq.reads import SpansRead, SparqRead

BATCHES = (1, 64, 256, 512)
MODEL_LENGTHS = (8192, 32768, 131072)
SHAPE = dict(heads=32, kv_heads=8, head_size=128)
"""Llama-3-8B."""

H100_SMS = 132


@dataclass
class Noted:
    """Names of the kernels in the order of their launches, and bytes of what was allocated between them."""

    kernels: list[str] = field(default_factory=list)
    scratch: int = 0


@contextmanager
def noted() -> Iterator[Noted]:
    """Launches in here are noted instead of done, on an H100; so are allocations, but the tensors are the op's own."""
    found, empty = Noted(), torch.empty

    def run(kernel: Any, *args: Any, **named: Any) -> None:
        found.kernels.append(kernel.fn.__name__)

    def note_bytes(*args: Any, **named: Any) -> torch.Tensor:
        tensor = empty(*args, **named)
        found.scratch += tensor.nbytes if tensor.device.type != "meta" else 0
        return tensor

    launch.n_multiprocessors.cache_clear()
    with (
        mock.patch.object(type(merge_kernel), "run", run),
        mock.patch.object(torch, "empty", note_bytes),
        mock.patch.object(launch, "INTERPRETED_SMS", H100_SMS),
    ):
        yield found
    launch.n_multiprocessors.cache_clear()


def read_of(**options: Any) -> SparqRead:
    """The defaults, with some options."""
    return SparqRead(r=16, min_k=128, k_per_token=Fraction(1, 16), dense_below=1024, **options)


def call(op: str, batch: int, model_length: int, *, layout: dict[str, Any] | None = None, **options: Any) -> Noted:
    """One call of ``op`` with requests that may be ``model_length`` tokens long; ``options`` of its read."""
    d, n = SHAPE["head_size"], 128
    parts: dict[str, Any] = dict(
        ranking="bounds" if op == "quest_decode" else "int4", value_sum="alpha_floor" in options
    )
    pages = Pages.empty(
        1, SHAPE["kv_heads"], PageLayout(head_size=d, block_size=n, dtype=torch.bfloat16, **parts | (layout or {}))
    )
    query = torch.empty(batch, SHAPE["heads"], d, dtype=torch.bfloat16)
    table, lens = torch.empty(batch, model_length // n, dtype=torch.int32), torch.empty(batch, dtype=torch.int32)
    given = query, pages, table, lens
    spans = SpansRead(min_k=128, k_per_token=Fraction(1, 16), dense_below=1024)
    calls: dict[str, Callable[[], None]] = {
        "sparq_decode": lambda: sparq_decode(*given, read=read_of(**options), scale=1.0, out=query),
        "quest_decode": lambda: quest_decode(*given, read=spans, scale=1.0, out=query),
        "dense_decode": lambda: dense_decode(*given, scale=1.0, out=query),
        "evict": lambda: evict(pages, table, lens, lens, lens, sinks=4, rank="attention", **options),
    }
    with noted() as found:
        calls[op]()
    return found


def table() -> str:
    """Markdown: launches and scratch of a default SparQ decode of one layer."""
    lines = [
        "| requests | " + " | ".join(f"{n // 1024}k" for n in MODEL_LENGTHS) + " |",
        "|---|" + "---|" * len(MODEL_LENGTHS),
    ]
    for batch in BATCHES:
        cells = [call("sparq_decode", batch, n) for n in MODEL_LENGTHS]
        texts = [f"{len(found.kernels)} launches, {found.scratch / 2**20:,.1f} MiB" for found in cells]
        lines.append(f"| {batch} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
