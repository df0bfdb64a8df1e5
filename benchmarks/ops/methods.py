"""What `vllm-sparq bench ops` measures: one row of `METHODS` each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparq.benchmarks.ops.cell import Cache, Call, Cell, Tensors
from vllm_sparq.benchmarks.ops.vllm_op import vllm_calls
from vllm_sparq.formats import FORMATS, QUANTIZED
from vllm_sparq.layout import PageLayout
from vllm_sparq.ops.dispatch import choose
from vllm_sparq.reads import DenseRead


def format_of(method: str) -> str:
    """How the blocks are stored that a method reads."""
    last = method.split("+")[-1]
    return last if last in FORMATS else "model"


def our_impl(op: str) -> str:
    choice = choose(op, "cpu")
    return f"{choice.implementation}: {choice.reason}"


def decode_calls(t: Tensors, op: str, cache: Cache, **options: object) -> Iterator[Call]:
    run = choose(op, "cpu").load()
    args = (t.query, cache.pages, cache.block_table, t.seq_lens)
    yield Call(our_impl(op), lambda: run(*args, scale=t.cell.scale, out=t.out, **options))


def write_calls(t: Tensors, *, fills: bool) -> Iterator[Call]:
    """Every request's token goes into its last block: in the middle of it, or so that it ``fills`` it."""
    op = choose("write", "cpu").load()
    cache = t.cache("model")
    n = t.cell.block_size
    lens = torch.full_like(t.seq_lens, (cache.block_table.shape[1] - 1) * n + (n if fills else n // 2 + 1))
    args = (t.key, t.value, cache.pages, cache.block_table, t.query_start_loc, lens)
    yield Call(our_impl("write"), lambda: op(*args))


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        summary: what it is.
        calls: how it is called, at every setting that is worth trying.
        bytes_moved: how many it must move.
        layout: of the pages that it works on; None where vLLM's own cache is read.
    """

    summary: str
    calls: Callable[[Tensors], Iterator[Call]]
    bytes_moved: Callable[[Cell], int]
    layout: Callable[[Cell], PageLayout | None]

    def cache_fields(self, cell: Cell) -> dict[str, Any]:
        """How its cache is cut, for keys and lines: tokens of a block, bytes of a token and KV head."""
        layout = self.layout(cell)
        if layout is None:
            return {"block_size": None, "kv_bytes_per_token": cell.token_bytes}
        return {"block_size": layout.block_size, "kv_bytes_per_token": layout.bytes_per_token}


def dense_method(format: str, summary: str) -> Method:
    return Method(
        summary,
        lambda t: decode_calls(t, "dense_decode", t.cache(format)),
        lambda c: c.bytes_moved(DenseRead(), format),
        lambda c: c.layout_as(format),
    )


def sparq_method(format: str, summary: str) -> Method:
    return Method(
        summary,
        lambda t: decode_calls(t, "sparq_decode", t.cache(format), read=t.cell.read_over(format)),
        lambda c: c.bytes_moved(c.read_over(format), format),
        lambda c: c.layout_as(format),
    )


def quest_method(format: str, summary: str) -> Method:
    return Method(
        summary,
        lambda t: decode_calls(t, "quest_decode", t.cache(format, bounds=True), read=t.cell.spans_read),
        lambda c: c.bytes_moved(c.spans_read, format),
        lambda c: c.layout_as(format, bounds=True),
    )


METHODS: dict[str, Method] = {
    "vllm": Method("vLLM's own dense op, at its best setting", vllm_calls, lambda c: c.dense_bytes, lambda c: None),
    "dense": dense_method("model", "our dense op"),
    **{name: dense_method(name, f"the same over {name} blocks") for name in QUANTIZED},
    "sparq": sparq_method("model", "SparQ"),
    **{f"sparq+{name}": sparq_method(name, f"SparQ over {name} blocks") for name in QUANTIZED},
    "quest": quest_method("model", "spans of tokens chosen by their bounds"),
    **{f"quest+{name}": quest_method(name, f"the same over {name} blocks") for name in QUANTIZED},
    "write": Method(
        "appending the step's tokens",
        lambda t: write_calls(t, fills=False),
        lambda c: 2 * c.batch * c.kv_heads * c.token_bytes,
        lambda c: c.layout,
    ),
    "write_last": Method(
        "the same when they fill their blocks, 1 step in a block's tokens: the ranking copy is made",
        lambda t: write_calls(t, fills=True),
        lambda c: c.batch * c.kv_heads * (c.block_size * c.token_bytes // 2 + c.layout.parts["ranking"].nbytes),
        lambda c: c.layout,
    ),
}
"""name -> what is timed. Of several calls, the fastest in a short trial is measured."""
