"""What a call of an op launches and how much scratch it takes on a GPU: noted on the CPU, nothing is run.

python -m tests.ops.launches    the table of docs/gpu.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from vllm_sparq.config import Options
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.dense_decode.triton import dense_decode
from vllm_sparq.ops.evict.triton import evict
from vllm_sparq.ops.quest_decode.triton import quest_decode
from vllm_sparq.ops.sparq_decode.triton import sparq_decode
from vllm_sparq.ops.triton_common import launch
from vllm_sparq.ops.triton_common.merge import merge_kernel
from vllm_sparq.reads import CUDA_BREAK_EVEN, READS, HeadShape

BATCHES = (1, 64, 256, 512)
MODEL_LENGTHS = (8192, 32768, 131072)
HEADS = HeadShape(head_size=128, n_heads=32, n_kv_heads=8)
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


def call(op: str, batch: int, model_length: int, *, layout: dict[str, Any] | None = None, **options: Any) -> Noted:
    """One call of ``op`` with requests that may be ``model_length`` tokens long, over the defaults on CUDA.

    Args:
        layout: more parts of a page, such as what evictions track.
        options: a user's; of ``evict``, arguments of the op.
    """
    chosen = {"dense_below": CUDA_BREAK_EVEN, "read": "spans" if op == "quest_decode" else "sparq"}
    user = Options(**chosen | ({} if op == "evict" else options))
    read, needs = user.read_of(HEADS), READS[user.read].needs(user, grouped=HEADS.grouped)
    d, n = HEADS.head_size, 128
    parts: dict[str, Any] = dict(ranking=needs.ranking, value_sum=needs.value_sum) | (layout or {})
    pages = Pages.empty(1, HEADS.n_kv_heads, PageLayout(head_size=d, block_size=n, dtype=torch.bfloat16, **parts))
    query = torch.empty(batch, HEADS.n_heads, d, dtype=torch.bfloat16)
    table, lens = torch.empty(batch, model_length // n, dtype=torch.int32), torch.empty(batch, dtype=torch.int32)
    given = query, pages, table, lens
    sparse: Any = {"sparq_decode": sparq_decode, "quest_decode": quest_decode}.get(op)
    calls: dict[str, Callable[[], None]] = {
        "dense_decode": lambda: dense_decode(*given, scale=1.0, out=query),
        "evict": lambda: evict(pages, table, lens, lens, lens, sinks=4, rank="attention", **options),
    }
    with noted() as found:
        calls.get(op, lambda: sparse(*given, read=read, scale=1.0, out=query))()
    return found


def launches(found: Noted) -> str:
    n = len(found.kernels)
    return f"{n} launch{'es' * (n > 1)}"


def table() -> str:
    """Markdown: launches and scratch of a default SparQ decode of one layer."""
    lines = [
        "| requests | " + " | ".join(f"{n // 1024}k" for n in MODEL_LENGTHS) + " |",
        "|---|" + "---|" * len(MODEL_LENGTHS),
    ]
    for batch in BATCHES:
        cells = [call("sparq_decode", batch, n) for n in MODEL_LENGTHS]
        texts = [f"{launches(found)}, {found.scratch / 2**20:,.1f} MiB" for found in cells]
        lines.append(f"| {batch} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
