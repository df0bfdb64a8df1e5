"""What the ahead-of-time tests compile: the shapes, options and page formats that ops are called with."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_sparq.layout import Pages
    from vllm_sparq.reads import SpansRead, SparqRead


@dataclass(frozen=True, kw_only=True)
class Shape:
    head_size: int
    dtype: str
    ranking: str | None
    format: str = "model"
    heads: int = 8
    kv_heads: int = 2
    block_size: int = 128
    alpha_floor: float = 0.5
    group_reduce: str = "logits"
    mass: float | None = None
    n_requests: int = 2
    new_tokens: int = 4096
    positions: bool = False
    tracked: bool = False  # positions and scores
    sinks: bool = False  # one learned number a head in the softmax
    soft_cap: float | None = None
    ops: tuple[str, ...] = ("write", "dense_decode", "sparq_decode", "prefill")


ALL = ("write", "dense_decode", "sparq_decode", "prefill", "evict")
DENSE = ("dense_decode", "prefill", "evict")
SPANS = ("write", "quest_decode")
ATTENDING = ("dense_decode", "sparq_decode", "prefill")
SHAPES = (
    Shape(head_size=128, dtype="bfloat16", ranking="int4"),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", heads=2, alpha_floor=0.0, ops=("sparq_decode",)),
    Shape(
        head_size=64,
        dtype="bfloat16",
        ranking="int8",
        heads=16,
        group_reduce="probs",
        block_size=64,
        n_requests=512,
        ops=("write", "sparq_decode"),
    ),
    Shape(head_size=80, dtype="float32", ranking="int4", alpha_floor=1.0),
    Shape(head_size=256, dtype="bfloat16", ranking="model", heads=4, block_size=32, new_tokens=2),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", format="int4"),
    Shape(head_size=128, dtype="bfloat16", ranking=None, format="kivi2"),
    Shape(head_size=128, dtype="bfloat16", ranking=None, format="k4v2"),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", format="k8v4"),
    Shape(
        head_size=64,
        dtype="float16",
        ranking="int8",
        format="int8",
        heads=16,
        alpha_floor=1.0,
        block_size=64,
        ops=("write", "dense_decode"),
    ),
    Shape(
        head_size=80,
        dtype="float32",
        ranking=None,
        format="kivi4",
        block_size=48,
        alpha_floor=1.0,
        ops=("sparq_decode", "prefill"),
    ),
    Shape(
        head_size=256,
        dtype="bfloat16",
        ranking=None,
        format="kivi2",
        heads=4,
        block_size=32,
        new_tokens=2,
        ops=("write", "dense_decode"),
    ),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", mass=0.9, ops=("sparq_decode",)),
    Shape(
        head_size=128,
        dtype="bfloat16",
        ranking=None,
        format="kivi4",
        heads=16,
        group_reduce="probs",
        mass=0.9,
        tracked=True,
        ops=("sparq_decode",),
    ),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", tracked=True, ops=ALL),
    Shape(
        head_size=64,
        dtype="float16",
        ranking="int8",
        heads=16,
        group_reduce="probs",
        block_size=64,
        n_requests=512,
        tracked=True,
        ops=("sparq_decode",),
    ),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", positions=True, alpha_floor=1.0, ops=ALL),
    Shape(head_size=80, dtype="float32", ranking="int4", format="int4", block_size=48, tracked=True, ops=("evict",)),
    Shape(head_size=128, dtype="bfloat16", ranking=None, format="kivi2", tracked=True, ops=("write", *DENSE)),
    Shape(head_size=256, dtype="float16", ranking=None, format="kivi4", block_size=256, tracked=True, ops=("evict",)),
    Shape(head_size=128, dtype="bfloat16", ranking="bounds", heads=32, kv_heads=8, alpha_floor=1.0, ops=SPANS),
    Shape(
        head_size=80,
        dtype="float32",
        ranking="bounds",
        format="kivi4",
        block_size=48,
        n_requests=512,
        alpha_floor=1.0,
        ops=SPANS,
    ),
    Shape(head_size=512, dtype="bfloat16", ranking="int4", ops=ALL[:-1]),
    Shape(head_size=192, dtype="bfloat16", ranking="int4", format="int4"),
    Shape(head_size=512, dtype="bfloat16", ranking=None, format="kivi4"),
    Shape(head_size=48, dtype="bfloat16", ranking="int4", ops=ALL[:-1]),
    Shape(head_size=512, dtype="bfloat16", ranking="int4", format="int4", tracked=True, ops=ALL),
    Shape(head_size=512, dtype="bfloat16", ranking="bounds", alpha_floor=1.0, ops=SPANS),
    Shape(head_size=64, dtype="bfloat16", ranking="int4", heads=16, sinks=True, ops=ATTENDING),
    Shape(head_size=256, dtype="bfloat16", ranking="int4", heads=4, soft_cap=50.0, mass=0.9, ops=ATTENDING),
    Shape(head_size=64, dtype="bfloat16", ranking="int8", format="int4", sinks=True, soft_cap=30.0, ops=ATTENDING),
    Shape(head_size=64, dtype="bfloat16", ranking=None, format="k4v2", heads=16, sinks=True, ops=ATTENDING),
    Shape(head_size=256, dtype="bfloat16", ranking="int4", format="k8v4", heads=4, soft_cap=50.0, ops=ATTENDING),
    Shape(head_size=256, dtype="bfloat16", ranking=None, format="kivi4", heads=4, soft_cap=50.0, ops=ATTENDING),
    Shape(head_size=64, dtype="bfloat16", ranking="int4", sinks=True, mass=0.9, ops=("sparq_decode",)),
    Shape(head_size=64, dtype="bfloat16", ranking="int4", sinks=True, soft_cap=30.0, tracked=True, ops=DENSE),
    Shape(head_size=128, dtype="bfloat16", ranking=None, format="k4v2", tracked=True, ops=DENSE),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", format="k8v4", tracked=True, ops=DENSE),
    Shape(head_size=64, dtype="bfloat16", ranking="bounds", sinks=True, alpha_floor=1.0, ops=("quest_decode",)),
    Shape(head_size=256, dtype="bfloat16", ranking="bounds", soft_cap=50.0, alpha_floor=1.0, ops=("quest_decode",)),
)


def pages_of(shape: Shape) -> Pages:
    import torch

    from vllm_sparq.layout import PageLayout, Pages

    layout = PageLayout(
        head_size=shape.head_size,
        block_size=shape.block_size,
        dtype=getattr(torch, shape.dtype),
        ranking=shape.ranking,
        value_sum=shape.alpha_floor < 1,
        format=shape.format,
        positions=shape.positions or shape.tracked,
        attention=shape.tracked,
    )
    return Pages.empty(1, shape.kv_heads, layout)


def reads_of(shape: Shape) -> tuple[SparqRead, SpansRead]:
    from vllm_sparq.reads import SpansRead, SparqRead

    few: dict[str, Any] = dict(min_k=128, k_per_token=Fraction(1, 16), dense_below=1024)
    sparq = SparqRead(
        r=max(1, shape.head_size // 8),
        alpha_floor=shape.alpha_floor,
        group_reduce=shape.group_reduce,
        mass=shape.mass,
        least_k=64,
        **few,
    )
    return sparq, SpansRead(**few)


STARTS = (
    Shape(head_size=128, dtype="bfloat16", ranking="int4", heads=32, kv_heads=8),
    Shape(head_size=128, dtype="bfloat16", ranking=None, format="kivi2", heads=32, kv_heads=8, tracked=True),
    Shape(head_size=256, dtype="bfloat16", ranking="bounds", heads=4, kv_heads=1, ops=("quest_decode",)),
)
"""What engines are started with."""


def launch_all(shape: Shape) -> None:
    """Call every op once on tensors of this shape."""
    import torch

    from vllm_sparq.ops.dense_decode.triton import dense_decode
    from vllm_sparq.ops.evict.triton import evict
    from vllm_sparq.ops.prefill.triton import prefill
    from vllm_sparq.ops.quest_decode.triton import quest_decode
    from vllm_sparq.ops.restore.triton import restore
    from vllm_sparq.ops.sparq_decode.triton import sparq_decode
    from vllm_sparq.ops.write.triton import write

    dtype, d, b = getattr(torch, shape.dtype), shape.head_size, shape.n_requests
    pages = pages_of(shape)
    query = torch.empty(shape.new_tokens, shape.heads, d, dtype=dtype)
    key = torch.empty(shape.new_tokens, shape.kv_heads, d, dtype=dtype)
    table = torch.empty(b, 4096 // shape.block_size, dtype=torch.int32)
    starts, lens = torch.empty(b + 1, dtype=torch.int32), torch.empty(b, dtype=torch.int32)
    read, spans = reads_of(shape)
    one = query[:b]
    cache = torch.empty(2, 1, shape.kv_heads, shape.block_size, d, dtype=dtype).transpose(2, 3)
    softmax = {"sinks": torch.empty(shape.heads) if shape.sinks else None, "soft_cap": shape.soft_cap}
    calls = {
        "write": lambda: write(key, key, pages, table, starts, lens, lens if pages.layout.positions else None),
        "prefill": lambda: prefill(query, key, key, pages, table, starts, lens, scale=1.0, out=query, **softmax),
        "dense_decode": lambda: dense_decode(one, pages, table, lens, scale=1.0, out=one, **softmax),
        "sparq_decode": lambda: sparq_decode(one, pages, table, lens, read=read, scale=1.0, out=one, **softmax),
        "quest_decode": lambda: quest_decode(one, pages, table, lens, read=spans, scale=1.0, out=one, **softmax),
        "restore": lambda: restore(pages, table, lens, lens, most_blocks=1, keys=cache[0], values=cache[1]),
        "evict": lambda: evict(
            pages, table, lens, lens, lens, sinks=4, rank="attention" if pages.layout.attention else "age"
        ),
    }
    for op in shape.ops:
        calls[op]()
    if pages.layout.quantized is not None and "prefill" in shape.ops:
        calls["restore"]()


def launch_start(shape: Shape) -> None:
    """What an engine launches before its first request, for block tables of 131,072 tokens."""
    from functools import partial

    from vllm_sparq.ops import warm_up
    from vllm_sparq.ops.dense_decode.triton import dense_decode
    from vllm_sparq.ops.evict.triton import evict
    from vllm_sparq.ops.prefill.triton import prefill
    from vllm_sparq.ops.quest_decode.triton import quest_decode
    from vllm_sparq.ops.sparq_decode.triton import sparq_decode
    from vllm_sparq.ops.write.triton import write

    pages, width = pages_of(shape), 131072 // shape.block_size
    sparq, spans = reads_of(shape)
    ops = {"sparq_decode": partial(sparq_decode, read=sparq), "quest_decode": partial(quest_decode, read=spans)}
    for decode in (dense_decode, *(op for name, op in ops.items() if name in shape.ops)):
        warm_up.warm_decodes(decode, pages, shape.heads, width)
    warm_up.warm_writes(write, pages, width)
    warm_up.warm_prefills(prefill, pages, shape.heads, width)
    if pages.layout.quantized is not None:
        warm_up.warm_restores(pages, width)
    if pages.layout.positions:
        warm_up.warm_evictions(evict, pages, width)


KERNELS = {
    "choose_kernel",
    "move_kernel",
    "sum_kernel",
    "attention_kernel",
    "note_prefill_kernel",
    "write_kernel",
    "encode_kernel",
    "open_sums_kernel",
    "attend_kernel",
    "merge_kernel",
    "score_kernel",
    "rank_kernel",
    "count_kernel",
    "partition_kernel",
    "cut_kernel",
    "prefill_kernel",
    "restore_kernel",
}
"""What `SHAPES` launch, by name."""
