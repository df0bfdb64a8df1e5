"""The README's table of methods: what each gains and what it costs, from this project's own results.

Speed is from `bench engine` and `bench ops`, memory and answers are from `eval`. Only lines of a clean tree count, and
every ratio is within one run: what a record says of the dense engine that took turns with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_sparq.benchmarks.reporting.runs import BUNDLED, SHAPE, dense_of, of_model
from vllm_sparq.config import Options

Record = Mapping[str, Any]

CONTEXT, BATCH = 65536, 8
"""Tokens and requests of the speeds that are shown."""

LAYER = {"heads": 32, "kv_heads": 8, "batch": 1}
"""The attention layer whose op is shown."""

LENGTH = 4096
"""Tokens of the text that is shown."""

MODELS = {"smollm2-135m": "SmolLM2", "gemma3-270m": "Gemma 3"}
"""Whose, and how the table calls them."""

MEMORY = {"bench": "quality", "task": "needle", "length": 1024}
"""What the bytes that are shown are counted for: the bundled model in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method.

    Attributes:
        title: what the user selects.
        idea: in a few words.
        paper: arXiv number; empty for dense.
        where: the files that implement it, links for the README.
        engine, op, text: the method's name in records of `bench engine`, `bench ops` and `eval`.
    """

    title: str
    idea: str
    paper: str = ""
    where: tuple[str, ...] = ()
    engine: str | None = None
    op: str | None = None
    text: str | None = None


ROWS = (
    Row(title="vLLM, dense", idea="", engine="dense", op="vllm", text="dense"),
    Row(
        title="`sparq`",
        idea="read best tokens, 1/8",
        paper="2312.04985",
        where=("vllm_sparq/ops/sparq_decode",),
        engine="sparq",
        op="sparq",
        text="sparq 1/8",
    ),
    Row(
        title="`quest`",
        idea="read best spans, 1/8",
        paper="2406.10774",
        where=("vllm_sparq/ops/quest_decode",),
        engine="quest",
        op="quest",
        text="quest 1/8",
    ),
    Row(
        title="`infllm`",
        idea="look up spans, 1/8 (CPU preview)",
        paper="2402.04617",
        where=("vllm_sparq/ops/represent",),
        engine="infllm",
        op="infllm",
        text="infllm 1/8",
    ),
    Row(
        title="`flexgen`",
        idea="4-bit blocks",
        paper="2303.06865",
        where=("vllm_sparq/ops/codec.py",),
        engine="flexgen",
        op="int4",
        text="int4",
    ),
    Row(
        title="`kivi`",
        idea="4-bit blocks, K by channel",
        paper="2402.02750",
        where=("vllm_sparq/ops/codec.py",),
        engine="kivi",
        op="kivi4",
        text="kivi4",
    ),
    Row(
        title="`h2o`",
        idea="keep most attended, 1/8",
        paper="2306.14048",
        where=("vllm_sparq/ops/evict",),
        engine="h2o",
        op="h2o",
        text="h2o 1/8",
    ),
    Row(
        title="`streaming`",
        idea="keep first and newest, 1/8",
        paper="2309.17453",
        where=("vllm_sparq/ops/evict",),
        engine="streaming",
        op="streaming",
        text="streaming 1/8",
    ),
)
"""The presets of `--attention-backend`, in the order of the table."""

ABSENT = "–"
"""Where nothing is on record."""


def methods_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per method, dense first."""
    clean = [record for record in records if not record.get("dirty")]
    names = ["method", "speed", "memory", f"bits per byte: {', '.join(MODELS.values())}", "paper", "code"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in ROWS:
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else ""
        files = ", ".join(f"[{path.rpartition('/')[2]}]({path})" for path in row.where)
        title = f"{row.title}: {row.idea}" if row.idea else row.title
        cells = [title, speed(row, clean), memory(row, clean), text(row, clean), paper, files]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speed(row: Row, records: Sequence[Record]) -> str:
    """Times vLLM's speed: per output token through the engine, and of the attention op alone; newest run of each."""
    token = newest(of_model(SHAPE, records), bench="engine", method=row.engine, context=CONTEXT, batch=BATCH)
    op = newest(records, bench="ops", method=row.op, context=CONTEXT, compression=Options().compression, **LAYER)
    return ", ".join(ABSENT if found is None else f"{found['speedup_vs_vllm']:.1f}x" for found in (token, op))


def memory(row: Row, records: Sequence[Record]) -> str:
    """Bytes of KV cache kept, dense = 1."""
    found = newest(of_model(BUNDLED, records), method=row.text, **MEMORY)
    dense = dense_of(found, records) if found else None
    return ABSENT if found is None or dense is None else f"{found['kv_bytes_held'] / dense['kv_bytes_held']:.2f}"


def text(row: Row, records: Sequence[Record]) -> str:
    """Bits per byte more than dense's, or dense's own."""
    found = []
    for model in MODELS:
        record = newest(records, bench="quality", method=row.text, task="text", length=LENGTH, model=model)
        if record is None:
            return ABSENT
        found.append(f"{record['difference']:+.3f}" if "difference" in record else f"{record['score']:.3f}")
    return ", ".join(found)


def newest(records: Sequence[Record], **case: Any) -> Record | None:
    """The last line that was written of a case; None where it was never measured."""
    found = [r for r in records if all(r.get(name) == value for name, value in case.items())]
    return found[-1] if found else None
