"""The compiled CPU kernels: which instruction set this machine gets, and how their C functions are called.

One source, a library for each instruction set (setup.py): ``vllm_sparq/lib/libsparq_<isa>.so``. The best one that this
CPU can run is loaded on first use, with plain ctypes: a call costs a few microseconds, and needs neither Python's nor
torch's ABI.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch  # first: its libgomp must be loaded before ours asks for one, so that both share one pool of threads

from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops import instruction_sets
from vllm_sparq.ops.instruction_sets import INSTRUCTION_SETS
from vllm_sparq.reads.infllm import REPRESENTATIVES, WINDOW_SPANS
from vllm_sparq.reads.spans import SPAN_TOKENS

LIBRARIES = Path(os.environ.get("VLLM_SPARQ_LIBRARIES") or Path(__file__).parents[1] / "lib")
"""Where the libraries are; `make sanitize` has others elsewhere."""

OVERRIDE = "VLLM_SPARQ_ISA"
"""Environment variable that restricts the search to one instruction set, for tests and measurements."""

STORAGE = ("channel_keys", "staged_per_page")
SLOPE = ("min_k", "slope", "slope_divisor")
PARTS = ("records", "ranking", "scales", "value_sum", "positions", "attention")

COMPILE_AGAIN = (
    "Compile the kernels again: `make setup` in a checkout, "
    "`pip install --force-reinstall --no-deps .` in one that is installed otherwise."
)
REFERENCE_INSTEAD = "the pure-torch reference runs instead, hundreds of times slower"


@dataclass(frozen=True)
class Found:
    """The library that runs here, or None, and the reason in words."""

    library: Path | None
    isa: str | None
    reason: str


@functools.cache
def find() -> Found:
    """The best compiled library for this CPU.

    Raises:
        ValueError: the override names no instruction set, one that this CPU lacks, or one that was not built.
        OSError: the library cannot be loaded, or was compiled from other sources than these.
    """
    forced = os.environ.get(OVERRIDE)
    if forced:
        return _find_forced(forced)
    runnable = instruction_sets.runnable()
    if not runnable:
        return Found(None, None, f"{instruction_sets.nothing_runs()}; {REFERENCE_INSTEAD}")
    for isa in runnable:
        if _library(isa).is_file():
            return _found(isa)
    reason = f"no compiled kernels in {LIBRARIES}; {REFERENCE_INSTEAD}. Install g++ and reinstall vllm-sparq."
    return Found(None, None, reason)


def _find_forced(isa: str) -> Found:
    if isa not in INSTRUCTION_SETS:
        raise ValueError(f"{OVERRIDE}={isa!r} is not an instruction set: use one of {list(INSTRUCTION_SETS)}")
    if lacks := instruction_sets.lacking(isa):
        runnable = instruction_sets.runnable()
        remedy = f"use one of {runnable}, or unset it" if runnable else "unset it"
        raise ValueError(f"{OVERRIDE}={isa!r} cannot run on this CPU: {lacks}; {remedy}")
    if not _library(isa).is_file():
        raise ValueError(f"{OVERRIDE}={isa!r} was not built: {_library(isa)} does not exist. Reinstall with g++.")
    return _found(isa)


def _library(isa: str) -> Path:
    return LIBRARIES / f"libsparq_{isa}.so"


def _found(isa: str) -> Found:
    check_abi(_library(isa))
    return Found(_library(isa), isa, f"{INSTRUCTION_SETS[isa].label} ({_library(isa).name})")


class DType(enum.IntEnum):
    """``sparq::DType`` of csrc/base/paged.h."""

    bf16 = 0
    fp16 = 1
    fp32 = 2


class RankingType(enum.IntEnum):
    """``sparq::RankingType`` of csrc/base/paged.h."""

    none = 0
    int4 = 1
    int8 = 2
    model = 3
    bounds = 4
    representatives = 5


class Rank(enum.IntEnum):
    """``sparq::Rank`` of csrc/base/paged.h, `vllm_sparq.retention.Rank`."""

    attention = 0
    age = 1


DTYPES = {torch.bfloat16: DType.bf16, torch.float16: DType.fp16, torch.float32: DType.fp32}


class CodesStruct(ctypes.Structure):
    """``sparq::Codes`` of csrc/base/paged.h."""

    _fields_: ClassVar = [
        *[(name, ctypes.c_int64) for name in ("codes", "code_stride", "scales", "scale_stride")],
        *[(name, ctypes.c_int32) for name in ("bits", "has_zero", "group", "midpoints")],
    ]


class PagesStruct(ctypes.Structure):
    """``sparq::Pages`` of csrc/base/paged.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("page_stride", "head_stride")],
        *[(name, ctypes.c_int64) for name in PARTS],
        *[(name, ctypes.c_int32) for name in ("n_kv_heads", "block_size", "head_size", "dtype", "ranking_type")],
        *[(name, ctypes.c_int32) for name in STORAGE],
        ("key", CodesStruct),
        ("value", CodesStruct),
    ]


class TensorStruct(ctypes.Structure):
    """``sparq::Tensor`` of csrc/base/paged.h."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("n_heads", ctypes.c_int32),
    ]


class RequestsStruct(ctypes.Structure):
    """``sparq::Requests`` of csrc/base/paged.h."""

    _fields_: ClassVar = [
        ("block_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("lens", ctypes.c_void_p),
        ("n", ctypes.c_int32),
    ]


class LogitsStruct(ctypes.Structure):
    """``sparq::Logits`` of csrc/base/paged.h."""

    _fields_: ClassVar = [("sinks", ctypes.c_void_p), ("scale", ctypes.c_float), ("soft_cap", ctypes.c_float)]


class SpansReadStruct(ctypes.Structure):
    """``sparq::SpansRead`` of csrc/base/reads.h."""

    _fields_: ClassVar = [
        (name, ctypes.c_int64) for name in (*SLOPE, "dense_below", "least", "n_first", "least_newest", "local")
    ]


class SparqReadStruct(ctypes.Structure):
    """``sparq::SparqRead`` of csrc/base/reads.h."""

    _fields_: ClassVar = [
        *[(name, ctypes.c_int64) for name in (*SLOPE, "dense_below", "local", "least_k")],
        *[(name, ctypes.c_int32) for name in ("r", "probs")],
        *[(name, ctypes.c_float) for name in ("alpha_floor", "mass")],
    ]


STRUCTS = (CodesStruct, PagesStruct, TensorStruct, RequestsStruct, LogitsStruct, SparqReadStruct, SpansReadStruct)
ENUMS = (DType, RankingType, Rank)
CONSTANTS = {"SPAN_TOKENS": SPAN_TOKENS, "REPRESENTATIVES": REPRESENTATIVES, "WINDOW_SPANS": WINDOW_SPANS}

C_TYPES: dict[str, Any] = dict(
    P=ctypes.POINTER(PagesStruct),
    T=ctypes.POINTER(TensorStruct),
    R=ctypes.POINTER(RequestsStruct),
    L=ctypes.POINTER(LogitsStruct),
    S=ctypes.POINTER(SparqReadStruct),
    N=ctypes.POINTER(SpansReadStruct),
    p=ctypes.c_void_p,
    l=ctypes.c_int64,
    i=ctypes.c_int32,
    f=ctypes.c_float,
)
"""Letter of a signature -> type of the argument. Structs are passed by their address."""

FUNCTIONS: dict[str, str] = {
    "sparq_write": "PTTRpp",  # pages, key, value, requests, query_start_loc, first_positions
    "sparq_dense_decode": "PTTRL",  # pages, query, out, requests, logits
    "sparq_turned_decode": "PTTTRL",  # pages, query, turned, out, requests, logits
    "sparq_sparq_decode": "PTTRLS",  # pages, query, out, requests, logits, read
    "sparq_quest_decode": "PTTRLN",
    "sparq_represent": "PTRp",  # pages, query, requests, query_start_loc
    "sparq_prefill": "PTTTTRppL",  # pages, query, key, value, out, requests, query_start_loc, key_start_loc, logits
    "sparq_evict": "PRppii",  # pages, requests, kept_lens, recent_from, sinks, rank
}
"""C function -> the letters of its arguments."""

ABI_VERSION = 1
"""Raised by hand where the meaning of the interface changes and none of its numbers does."""


def abi() -> int:
    """What `sparq_abi` of a library must return: everything above in one number, as csrc/abi.cpp puts it together."""
    numbers = [ABI_VERSION, *CONSTANTS.values()]
    for kind in ENUMS:
        numbers += list(kind)
    for struct in STRUCTS:
        numbers += [ctypes.sizeof(struct), *(getattr(struct, name).offset for name, *_ in struct._fields_)]
    for letters in FUNCTIONS.values():
        numbers += [ord(letter) for letter in letters]
    digest = 0xCBF29CE484222325  # FNV-1a, a number at a time
    for number in numbers:
        digest = (digest ^ number) * 0x100000001B3 % 2**64
    return digest


def check_abi(path: Path) -> None:
    """Refuse a library whose functions would read other memory than this code means.

    Raises:
        OSError: it cannot be loaded, or was compiled from other sources than these.
    """
    try:
        function = ctypes.CDLL(str(path)).sparq_abi
    except OSError as error:
        raise OSError(
            f"{path} cannot be loaded on this {platform.machine()} ({error}): it was compiled for another "
            f"architecture, or is damaged. {COMPILE_AGAIN}"
        ) from None
    except AttributeError:
        theirs = "none"
    else:
        function.restype = ctypes.c_uint64
        theirs = f"{function():016x}"
    if theirs != (ours := f"{abi():016x}"):
        raise OSError(
            f"{path} has the C interface {theirs}, but this version of vllm-sparq calls {ours}: the compiled kernels "
            f"are older or newer than the Python code beside them. {COMPILE_AGAIN}"
        )


_instead: Path | None = None


@contextmanager
def another_build(path: Path) -> Iterator[None]:
    """Within, the ops call this library: two builds are compared best over the same pages, in turns.

    Raises:
        OSError: it cannot be loaded, or was compiled from sources with another interface.
    """
    global _instead
    check_abi(path)
    before, _instead = _instead, path
    try:
        yield
    finally:
        _instead = before


def function(name: str) -> Any:
    """One of `FUNCTIONS`, which return nothing.

    Raises:
        RuntimeError: there is no library to take it from.
    """
    return _function(name, _instead)


@functools.cache
def _function(name: str, instead: Path | None) -> Any:
    symbol = getattr(library() if instead is None else ctypes.CDLL(str(instead)), name)
    symbol.argtypes = [C_TYPES[letter] for letter in FUNCTIONS[name]]
    symbol.restype = None
    return symbol


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: there is none.
    """
    found = find()
    if found.library is None:
        raise RuntimeError(found.reason)
    return ctypes.CDLL(str(found.library))


def pages_struct(pages: Pages) -> PagesStruct:
    """The pages of a layer, put together on its first call."""
    data = pages.data
    return _pages_struct(data.data_ptr(), data.stride(), data.shape[1], pages.layout)


@functools.lru_cache(maxsize=4096)  # keyed by value, so a struct that outlives its tensor does no harm
def _pages_struct(data: int, strides: tuple[int, ...], n_kv_heads: int, layout: PageLayout) -> PagesStruct:
    offsets = [layout.parts[name].offset if name in layout.parts else -1 for name in PARTS]
    numbers = (
        n_kv_heads,
        layout.block_size,
        layout.head_size,
        DTYPES[layout.dtype],
        RankingType[layout.ranking or "none"],
    )
    codes = [_codes_struct(layout, name) for name in ("key", "value")]
    return PagesStruct(data, strides[0], strides[1], *offsets, *numbers, *_storage(layout), *codes)


def _storage(layout: PageLayout) -> tuple[int, ...]:
    """The numbers of `STORAGE`: how full blocks are quantized; zeros for ``model``."""
    fmt = layout.quantized
    if fmt is None:
        return (0,) * len(STORAGE)
    return fmt.channel_keys, layout.staged_per_page


def _codes_struct(layout: PageLayout, name: str) -> CodesStruct:
    """Where the codes and scales of K or V begin in a page, how far its rows lie apart, and what they are.

    Zeros for ``model``.
    """
    if layout.quantized is None:
        return CodesStruct()
    coding = layout.coding(name)
    page = Pages.empty(1, 1, layout)
    found = []
    for view in (getattr(page, f"{name}_codes"), getattr(page, f"{name}_scales")):
        found += [view.data_ptr() - page.data.data_ptr(), view.stride(2) * view.element_size()]
    return CodesStruct(*found, coding.bits, coding.scale_numbers == 2, layout.group(name), coding.midpoints)


def tensor(x: torch.Tensor) -> TensorStruct:
    """[rows, heads, D], dense in its last dimension."""
    return TensorStruct(x.data_ptr(), x.stride(0), x.stride(1), x.shape[1])


def logits(scale: float, sinks: torch.Tensor | None, soft_cap: float | None) -> LogitsStruct:
    """What the softmax of a call is over besides the tokens; ``sinks`` [H], fp32 and dense."""
    return LogitsStruct(None if sinks is None else sinks.data_ptr(), scale, soft_cap or 0.0)


def requests(block_table: torch.Tensor, lens: torch.Tensor, n: int) -> RequestsStruct:
    """The first ``n`` rows of a block table, and the tokens of each."""
    return RequestsStruct(block_table.data_ptr(), block_table.stride(0), lens.data_ptr(), n)
