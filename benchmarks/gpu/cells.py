"""The cells of `gpu_check.py`: each a few seconds of a GPU with a name of its own, in the order of what they are worth.

    check/NAME             a case beside the reference: every op, twice; far pages, a sink, equal scores among them
    graph/FORMAT           a captured step whose tables, lengths and pages change
    copy                   what the memory can do
    decode/PAGES/bBsS      a decode step of one layer, B requests of S tokens, beside a rival
    prefill/FORMAT/cCtT    T new tokens of a prompt after C tokens
    kernels/PAGES/bBsS     microseconds of each kernel of a sparse read

PAGES is a format, and after a plus a ranking copy other than int4, or `sink`, `equal`, `narrow`: a block table no wider
than the context. All other tables are as wide as an engine's of `TABLE_TOKENS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from vllm_sparq.benchmarks.gpu.cases import Case

TABLE_TOKENS = 131072 + 1024
"""What a block table has room for: an engine's is as wide as its longest request may get."""

FAR_BYTES = 9 << 30
"""More than 2**31 elements of any type that pages are looked at as."""

Kind = Literal["check", "graph", "copy", "decode", "prefill", "kernels"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        name: what it is selected by and recorded as.
        kind: what is done.
        seconds: what it takes on an H100, its kernels compiled: a guess, which the budget corrects as it goes.
        case: the layer, and of checks the requests.
        requests: B.
        context: S tokens of each; of a prompt those before the new ones.
        chunk: T new tokens of a prompt.
        table_tokens: what the block tables have room for, at least.
    """

    name: str
    kind: Kind
    seconds: float
    case: Case
    requests: int = 1
    context: int = 0
    chunk: int = 0
    table_tokens: int = TABLE_TOKENS

    @property
    def launches_ours(self) -> bool:
        """Whether there is anything to compile."""
        return self.kind != "copy"


FORMATS = ("model", "int4", "int8", "kivi4", "k8v4", "k4v2")

LAYER = Case(lens=())
"""32 query heads, 8 KV heads of 128, bfloat16: a layer of Llama-3.1-8B, its mean value included."""

CHECKS: dict[str, Case] = {
    "model": Case(),
    "heads": Case(heads=8, kv_heads=8, alpha_floor=0.0),
    "int4": Case(format="int4"),
    "far": Case(far_bytes=FAR_BYTES, lens=(1, 129, 1500, 4096)),
    "sink": Case(keys="sink", alpha_floor=0.0),
    "equal": Case(keys="equal", lens=(1500, 4000)),
    "model+bounds": Case(ranking="bounds"),
    "kivi4": Case(format="kivi4"),
    "int8": Case(format="int8"),
    "model+tracked": Case(tracked=True),
    "far+int4": Case(far_bytes=FAR_BYTES, format="int4", lens=(1, 129, 1500, 4096)),
    "mass": Case(local=8, mass=0.5),
    "k8v4": Case(format="k8v4"),
    "k4v2": Case(format="k4v2"),
    "kivi2": Case(format="kivi2"),
    "probs": Case(
        heads=16, kv_heads=2, head_size=64, ranking="int8", group_reduce="probs", dtype="float16", block_size=64
    ),
    "float32": Case(heads=6, kv_heads=2, head_size=80, alpha_floor=1.0, dtype="float32", block_size=48),
    "model-ranking": Case(heads=5, kv_heads=1, head_size=96, ranking="model", block_size=16, local=0),
    "head256": Case(heads=4, kv_heads=2, head_size=256, block_size=256, dtype="float16"),
    **{
        f"{name}+tracked": Case(format=name, tracked=True)
        for name in ("int8", "int4", "kivi4", "kivi2", "k8v4", "k4v2")
    },
    **{
        f"{name}+bounds": Case(format=name, ranking="bounds")
        for name in ("int8", "int4", "kivi4", "kivi2", "k8v4", "k4v2")
    },
    "all-kivi4": Case(
        heads=16,
        kv_heads=2,
        head_size=64,
        group_reduce="probs",
        alpha_floor=1.0,
        mass=0.1,
        format="kivi4",
        tracked=True,
    ),
    "float32-int4": Case(
        heads=6, kv_heads=2, head_size=80, alpha_floor=1.0, dtype="float32", block_size=48, format="int4"
    ),
    "head96-kivi2": Case(heads=5, kv_heads=1, head_size=96, block_size=64, local=0, dtype="float16", format="kivi2"),
    "head256-kivi4": Case(heads=4, kv_heads=2, head_size=256, block_size=256, dtype="float16", format="kivi4"),
    "probs-int8": Case(
        heads=16, kv_heads=2, head_size=64, ranking="int8", group_reduce="probs", block_size=64, format="int8"
    ),
    "heads+tracked": Case(
        heads=8, kv_heads=8, alpha_floor=0.0, dtype="float16", block_size=48, ranking="int8", tracked=True
    ),
    "probs+tracked": Case(
        heads=16, kv_heads=2, head_size=64, group_reduce="probs", dtype="float16", block_size=64, tracked=True
    ),
    "float32+bounds": Case(heads=6, kv_heads=2, head_size=80, dtype="float32", block_size=48, ranking="bounds"),
    "block16+bounds": Case(heads=16, kv_heads=2, head_size=64, dtype="float16", block_size=16, ranking="bounds"),
    "head96-kivi2+bounds": Case(
        heads=5, kv_heads=1, head_size=96, dtype="float16", block_size=64, format="kivi2", ranking="bounds"
    ),
}
"""Name -> case, those that would spoil most figures first."""

FIRST_CHECKS = 6
"""Come before any time is taken: a wrong kernel's time is worth nothing."""


def named(pages: str) -> Case:
    """The layer over pages of a name such as `int4`, `model+bounds` or `model+sink`."""
    format, _, more = pages.partition("+")
    case = replace(LAYER, format=format)
    if more == "sink":
        return replace(case, keys="sink")
    if more == "equal":
        return replace(case, keys="equal")
    if more in ("bounds", "int8", "model"):
        return replace(case, ranking=more)
    return replace(case, tracked=more == "tracked")


def decode(pages: str, requests: int, context: int, *, kind: Kind = "decode", seconds: float = 2.0) -> Cell:
    """A step of so many requests over pages of a name; with `narrow` behind it, in a block table as wide as needed."""
    name = f"{kind}/{pages}/b{requests}s{shown(context)}"
    case, table = named(pages), context if pages.endswith("narrow") else TABLE_TOKENS
    size = dict(requests=requests, context=context)
    return Cell(name=name, kind=kind, seconds=seconds, case=case, table_tokens=table, **size)


def prefill(format: str, context: int, chunk: int) -> Cell:
    """A chunk of one prompt."""
    name, seconds = f"prefill/{format}/c{shown(context)}t{shown(chunk)}", 2 + 6 * context / 131072
    size = dict(context=context, chunk=chunk)
    return Cell(name=name, kind="prefill", seconds=seconds, case=replace(LAYER, format=format), **size)


def shown(tokens: int) -> str:
    """Such as 32k."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def check(name: str) -> Cell:
    """A case beside the reference."""
    return Cell(name=f"check/{name}", kind="check", seconds=2.5, case=CHECKS[name])


def graph(name: str) -> Cell:
    """A captured step."""
    return Cell(name=f"graph/{name}", kind="graph", seconds=2.0, case=replace(named(name), lens=Case().lens))


K = 1024


def all_cells() -> list[Cell]:
    """Everything, what is worth most first."""
    checks, graphs = [check(name) for name in CHECKS], [graph(name) for name in ("model", "int4", "kivi4")]
    at_bars = [(1, 128 * K), (16, 32 * K)]
    rest = [(b, s) for s in (4 * K, 16 * K, 32 * K, 128 * K) for b in (1, 4, 16, 64) if (b, s) not in at_bars]
    found = [
        *checks[:2],
        graphs[0],
        Cell(name="copy", kind="copy", seconds=1.0, case=LAYER),
        *(decode("model", *at) for at in at_bars),
        *(prefill("model", c, 8 * K) for c in (32 * K, 0)),
        *checks[2:FIRST_CHECKS],
        decode("model", 256, 512),
        decode("model+sink", 16, 32 * K),
        decode("model", 1, 16 * K),
        *(decode(format, 16, 32 * K) for format in FORMATS[1:]),
        *(decode("model", *at, kind="kernels") for at in at_bars),
        *graphs[1:],
        *checks[FIRST_CHECKS:12],
        decode("model+bounds", 16, 32 * K),
        decode("model+equal", 16, 32 * K),
        decode("model+narrow", 1, 4 * K),
        prefill("model", 128 * K, 8 * K),
        *(prefill(format, 32 * K, 8 * K) for format in FORMATS[1:]),
        decode("model+bounds", 1, 128 * K),
        *(decode(format, 1, 128 * K) for format in FORMATS[1:]),
        *(decode("model", b, s) for b, s in sorted(rest, key=lambda at: at[0] * at[1])),
        decode("model+tracked", 16, 32 * K),
        *(decode("int4", *at, kind="kernels") for at in at_bars),
        *(decode("model+bounds", *at, kind="kernels") for at in at_bars),
        *checks[12:],
    ]
    return list(dict.fromkeys(found))


def selected(cells: Iterable[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Those whose name a pattern fits, or begins with it and a slash; all, if there is none.

    Raises:
        ValueError: a pattern that fits no cell.
    """
    cells = list(cells)
    for pattern in patterns:
        if not any(fits(cell, pattern) for cell in cells):
            raise ValueError(f"--only {pattern!r} fits no cell: --list names them")
    return [cell for cell in cells if not patterns or any(fits(cell, pattern) for pattern in patterns)]


def fits(cell: Cell, pattern: str) -> bool:
    return fnmatchcase(cell.name, pattern) or cell.name.startswith(pattern.rstrip("/") + "/")


def lines(cells: Sequence[Cell]) -> Iterator[str]:
    """For `--list`."""
    for cell in cells:
        yield f"{cell.name:<28} about {cell.seconds:.0f} s"
    yield f"{len(cells)} cells, about {sum(cell.seconds for cell in cells) / 60:.0f} minutes once compiled"
