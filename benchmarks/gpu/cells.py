"""The cells of `gpu_check.py`: each a few seconds of a GPU with a name of its own, in the order of what they are worth.

    check/NAME             a case beside the reference: every op, twice; far pages, a sink, equal scores among them
    graph/FORMAT           a captured step whose tables, lengths and pages change
    copy                   what the memory can do
    decode/PAGES/bBsS      a decode step of one layer, B requests of S tokens, beside a rival
    prefill/FORMAT/cCtT    T new tokens of a prompt after C tokens
    kernels/PAGES/bBsS     microseconds of each kernel of a sparse read

PAGES is a format, and after a plus what is not as a CUDA engine has it by default: a ranking copy other than int4, or

    sparse                 read sparsely whatever the context, where an engine begins at `CUDA_BREAK_EVEN` tokens
    mean                   the mean of V stands in for unread tokens
    tracked                positions and scores, so that tokens can be evicted
    sink, equal            keys of which one outweighs all others, or that are the same
    narrow                 a block table no wider than the context: others are as wide as an engine's of `TABLE_TOKENS`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from vllm_sparq.benchmarks.gpu.cases import Case
from vllm_sparq.reads import CUDA_BREAK_EVEN

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

LONG_BLOCK, BLOCK = 256, 128
"""Tokens of an engine's blocks where contexts may be as long as `TABLE_TOKENS`: K with int4 codes beside it, others."""

LAYER = Case(lens=(), block_size=LONG_BLOCK)
"""32 query heads, 8 KV heads of 128, bfloat16: a layer of Llama-3.1-8B, as a CUDA engine has it by default."""

AT_ONCE = 0
"""Value of `Case.dense_below` with which every context that a read takes less than all of is read sparsely."""


def small(**more: Any) -> Case:
    """A case that says more of a kernel than its defaults would: sparse reads of short contexts, and a mean value."""
    return Case(**{"alpha_floor": 0.5, "least_k": 16, "dense_below": 1024, **more})


def default(**more: Any) -> Case:
    """A case of the defaults, on both sides of where an engine begins to read sparsely."""
    return Case(lens=(300, CUDA_BREAK_EVEN + 700), **more)


CHECKS: dict[str, Case] = {
    "default": default(block_size=LONG_BLOCK),
    "model": small(),
    "heads": small(heads=8, kv_heads=8, alpha_floor=0.0),
    "int4": small(format="int4"),
    "far": small(far_bytes=FAR_BYTES, lens=(1, 129, 1500, 4096)),
    "sink": small(keys="sink", alpha_floor=0.0),
    "equal": small(keys="equal", lens=(1500, 4000)),
    "model+bounds": small(ranking="bounds"),
    "kivi4": small(format="kivi4"),
    "int8": small(format="int8"),
    "model+tracked": small(tracked=True),
    "far+int4": small(far_bytes=FAR_BYTES, format="int4", lens=(1, 129, 1500, 4096)),
    "default+int4": default(format="int4"),
    "default+kivi4": default(format="kivi4"),
    "default+bounds": default(ranking="bounds"),
    "mass": small(local=8, mass=0.5),
    "k8v4": small(format="k8v4"),
    "k4v2": small(format="k4v2"),
    "kivi2": small(format="kivi2"),
    "probs": small(
        heads=16, kv_heads=2, head_size=64, ranking="int8", group_reduce="probs", dtype="float16", block_size=64
    ),
    "float32": small(heads=6, kv_heads=2, head_size=80, alpha_floor=1.0, dtype="float32", block_size=48),
    "model-ranking": small(heads=5, kv_heads=1, head_size=96, ranking="model", block_size=16, local=0),
    "head256": small(heads=4, kv_heads=2, head_size=256, block_size=256, dtype="float16"),
    **{
        f"{name}+tracked": small(format=name, tracked=True)
        for name in ("int8", "int4", "kivi4", "kivi2", "k8v4", "k4v2")
    },
    **{
        f"{name}+bounds": small(format=name, ranking="bounds")
        for name in ("int8", "int4", "kivi4", "kivi2", "k8v4", "k4v2")
    },
    "all-kivi4": small(
        heads=16,
        kv_heads=2,
        head_size=64,
        group_reduce="probs",
        alpha_floor=1.0,
        mass=0.1,
        format="kivi4",
        tracked=True,
    ),
    "float32-int4": small(
        heads=6, kv_heads=2, head_size=80, alpha_floor=1.0, dtype="float32", block_size=48, format="int4"
    ),
    "head96-kivi2": small(heads=5, kv_heads=1, head_size=96, block_size=64, local=0, dtype="float16", format="kivi2"),
    "head256-kivi4": small(heads=4, kv_heads=2, head_size=256, block_size=256, dtype="float16", format="kivi4"),
    "probs-int8": small(
        heads=16, kv_heads=2, head_size=64, ranking="int8", group_reduce="probs", block_size=64, format="int8"
    ),
    "heads+tracked": small(
        heads=8, kv_heads=8, alpha_floor=0.0, dtype="float16", block_size=48, ranking="int8", tracked=True
    ),
    "probs+tracked": small(
        heads=16, kv_heads=2, head_size=64, group_reduce="probs", dtype="float16", block_size=64, tracked=True
    ),
    "float32+bounds": small(heads=6, kv_heads=2, head_size=80, dtype="float32", block_size=48, ranking="bounds"),
    "block16+bounds": small(heads=16, kv_heads=2, head_size=64, dtype="float16", block_size=16, ranking="bounds"),
    "head96-kivi2+bounds": small(
        heads=5, kv_heads=1, head_size=96, dtype="float16", block_size=64, format="kivi2", ranking="bounds"
    ),
}
"""Name -> case, those that would spoil most figures first."""

FIRST_CHECKS, EARLY_CHECKS = 7, 16
"""So many come before most times, and before the times of formats: a wrong kernel's time is worth nothing."""


MEANT: dict[str, dict[str, Any]] = {
    "": {},
    "narrow": {},
    "sparse": {"dense_below": AT_ONCE},
    "mean": {"alpha_floor": 0.0},
    "tracked": {"tracked": True},
    **{kind: {"keys": kind} for kind in ("sink", "equal")},
    **{ranking: {"ranking": ranking} for ranking in ("bounds", "int8", "model")},
}
"""What comes after the plus in the name of pages -> what it says of the case."""


def named(pages: str) -> Case:
    """The layer over pages of a name such as `int4`, `model+bounds` or `model+sink`."""
    format, _, more = pages.partition("+")
    block = LONG_BLOCK if format == "model" and more not in ("bounds", "int8", "model", "tracked") else BLOCK
    return replace(LAYER, format=format, block_size=block, **MEANT[more])


def decode(pages: str, requests: int, context: int, *, kind: Kind = "decode", seconds: float = 2.0) -> Cell:
    """A step of so many requests over pages of a name."""
    name = f"{kind}/{pages}/b{requests}s{shown(context)}"
    case, table = named(pages), context if pages.endswith("narrow") else TABLE_TOKENS
    size = dict(requests=requests, context=context)
    return Cell(name=name, kind=kind, seconds=seconds, case=case, table_tokens=table, **size)


def prefill(format: str, context: int, chunk: int) -> Cell:
    """A chunk of one prompt."""
    name, seconds = f"prefill/{format}/c{shown(context)}t{shown(chunk)}", 2 + 6 * context / 131072
    size = dict(context=context, chunk=chunk)
    return Cell(name=name, kind="prefill", seconds=seconds, case=named(format), **size)


def shown(tokens: int) -> str:
    """Such as 32k."""
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)


def check(name: str) -> Cell:
    """A case beside the reference."""
    return Cell(name=f"check/{name}", kind="check", seconds=2.5, case=CHECKS[name])


def graph(name: str) -> Cell:
    """A captured step, over requests that are short and read sparsely all the same."""
    case = replace(named(name), dense_below=1024, lens=Case().lens)
    return Cell(name=f"graph/{name}", kind="graph", seconds=2.0, case=case)


K = 1024

BARS = ((1, 128 * K), (16, 32 * K))
"""Requests and tokens of each that the project has set itself goals for."""

BREAK_EVEN = tuple((b, s) for s in (4 * K, 8 * K, 16 * K, 32 * K) for b in (1, 16))
"""Those between which a sparse read begins to pay: what `CUDA_BREAK_EVEN` guesses."""

SHORT = (256, 512)
"""A batch that the sparse op reads densely: what having SparQ costs where it gains nothing."""


def all_cells() -> list[Cell]:
    """Everything, what is worth most first."""
    checks, graphs = (
        [check(name) for name in CHECKS],
        [graph(name) for name in ("model", "int4", "kivi4", "model+mean")],
    )
    rest = [(b, s) for s in (16 * K, 32 * K, 128 * K) for b in (1, 4, 16, 64) if (b, s) not in BARS]
    short = [(b, s) for s in (4 * K, 8 * K) for b in (4, 64)]
    found = [
        *checks[:3],
        graphs[0],
        Cell(name="copy", kind="copy", seconds=1.0, case=LAYER),
        *(decode("model", *at) for at in BARS),
        *(decode("model+sparse", *at) for at in BREAK_EVEN),
        *(prefill("model", c, 8 * K) for c in (32 * K, 0)),
        *checks[3:FIRST_CHECKS],
        decode("model", *SHORT),
        decode("model+sink", 16, 32 * K),
        decode("model+mean", 16, 32 * K),
        decode("model", 1, 16 * K),
        *(decode(format, 16, 32 * K) for format in FORMATS[1:]),
        *(decode("model", *at, kind="kernels") for at in BARS),
        *graphs[1:],
        *checks[FIRST_CHECKS:EARLY_CHECKS],
        decode("model+bounds", 16, 32 * K),
        decode("model+equal", 16, 32 * K),
        decode("model+narrow", 1, 16 * K),
        prefill("model", 128 * K, 8 * K),
        *(prefill(format, 32 * K, 8 * K) for format in FORMATS[1:]),
        decode("model+bounds", 1, 128 * K),
        *(decode(format, 1, 128 * K) for format in FORMATS[1:]),
        *(decode("model+sparse", *at) for at in short),
        *(decode("model", b, s) for b, s in sorted(rest, key=lambda at: at[0] * at[1])),
        decode("model+tracked", 16, 32 * K),
        *(decode("int4", *at, kind="kernels") for at in BARS),
        *(decode("model+bounds", *at, kind="kernels") for at in BARS),
        *checks[EARLY_CHECKS:],
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
