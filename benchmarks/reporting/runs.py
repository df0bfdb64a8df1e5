"""What a line of results measured: by this lines are told apart, set beside dense, and drawn together.

Every field of a line counts but those that are named here, so that a new setting takes part by itself. A new figure
under a name that is not known here keeps lines apart: that hides a ratio, and never makes a wrong one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.records import comparable
from vllm_sparq.formats import FORMATS

Record = Mapping[str, Any]

FIGURES = frozenset(
    {
        *("attention", "impl", "kv_bytes", "kv_bytes_per_token", "kv_capacity_tokens", "tokens_per_step"),
        *("acceptance", "overhead", "amdahl_bound", "preemptions", "preemptions_avoided", "n_failed", "duration"),
        *("elapsed_time", "num_requests", "latencies", "percentiles", "completed", "failed", "rtfx"),
        *("max_concurrent_requests", "seconds", "wall_seconds", "n_prompt_tokens", "n_output_tokens", "prompt_tokens"),
        *("output_tokens", "per_replica", "score", "low", "high", "n_skipped", "n_cut", "beyond_model"),
        *("kl", "changed", "difference", "bytes_moved", "kv_bytes_moved", "kv_bytes_held", "multiply_adds"),
        *("total_num_tokens", "total_input_tokens", "total_output_tokens"),
    }
)
"""Fields that say what was found."""

FIGURE = re.compile(
    r"^(mean|median|std|avg|p\d+|least|most|max_output|speedup|share_of)_"
    r"|_(ms|us|low|high|p99|goodput|throughput)$|_per_s(econd)?$"
)
"""How the names of the others begin or end."""

WHEN = frozenset(
    {
        *("schema", "key", "date", "began", "commit", "dirty", "changes"),
        *("python", "torch", "triton", "driver", "vllm", "vllm-sparq"),
    }
)
"""Fields that say when, and with which code: of lines that differ in no more than these the newest counts."""

METHOD = ("method", "options", "arguments", "backend", "model_id", "block_size", "ranking", "compression", "r", "k")
"""Fields that say what was asked of one method; all others that are no figures were asked of dense as well."""

GIVEN = frozenset({"sparq", "attention_backend", "worker_extension_cls"})
"""What an engine is given for its method, among its arguments: the method says so already."""

LATER = ("cores", "isa", "threads")
"""Fields that every line of today has. One without gives way to a newer one that contradicts it in nothing."""

NO_MATTER = {"quality": ("cores", "threads")}
"""Kind -> fields that its figures do not depend on."""

APART = {"quality": ("model", "dtype")}
"""Kind -> by what its lines stand in tables and pictures of their own; others by `MODEL_AND_MACHINE`."""

MODEL_AND_MACHINE = ("model", "dtype", "cpu", "gpu", "isa")


SHAPE, BUNDLED = "Llama-3.2-1B shape, 4 layers, dummy weights", "weights"
"""What lines call the models that the documents show engines and generated tasks of."""


def kind_of(record: Record) -> str:
    """What was measured; lines of `bench ops` did not say so at first."""
    return str(record.get("bench") or ("ops" if "median_us" in record else ""))


def settings(record: Record) -> dict[str, Any]:
    """All that was asked, and where it ran: without figures, versions, and what is empty."""
    kind = kind_of(record)
    unread = _read_by_nobody(record) if kind == "ops" else ()
    found = {
        name: _plain(value)
        for name, value in record.items()
        if not (name in FIGURES or FIGURE.search(name) or name in WHEN or name in GIVEN or name in unread)
        and name not in NO_MATTER.get(kind, ())
    }
    of_server = record.get("sparq")
    if isinstance(of_server, Mapping):  # `bench serve` and whole requests have the options there
        found.setdefault("options", of_server.get("options"))
    return {name: value for name, value in found.items() if value is not None and value not in ({}, [])}


def case(record: Record) -> dict[str, Any]:
    """What was asked of dense as well, and where it ran."""
    return {name: value for name, value in settings(record).items() if name not in METHOD}


def identity(record: Record, but: Collection[str] = ()) -> str:
    """The same for lines that measured the same, whatever the code was; ``but`` are fields that do not count."""
    return _text_of_all(settings(record), but)


def newest(records: Sequence[Record]) -> list[Record]:
    """The last of the lines that measured the same, in the order in which each was first measured."""
    found: dict[str, Record] = {}
    told: set[str] = set()
    known = [settings(record) for record in records]
    names = [_text_of_all(one) for one in known]
    for record, one, name in zip(reversed(records), reversed(known), reversed(names), strict=True):
        if name not in told:
            found[name] = record
        some = chain.from_iterable(combinations(LATER, n) for n in range(len(LATER) + 1))
        told.update(_text_of_all(one, but) for but in some)
    return [found[name] for name in dict.fromkeys(names) if name in found]


def _text_of_all(known: Mapping[str, Any], but: Collection[str] = ()) -> str:
    return json.dumps({name: value for name, value in known.items() if name not in but}, sort_keys=True, default=str)


def dense_of(record: Record, records: Sequence[Record]) -> Record | None:
    """The newest line of dense for the same case, of the same code and machine; None if there is none."""
    if record.get("method") == DENSE:
        return record
    mine = case(record)
    alike = (other for other in reversed(records) if other.get("method") == DENSE and comparable(other, record))
    return next((other for other in alike if case(other) == mine), None)


def of_model(name: str, records: Sequence[Record]) -> list[Record]:
    """The lines of a model, and those that name none."""
    return [record for record in records if record.get("model", name) == name]


def apart(kind: str, records: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Values of `names_apart` -> the lines that one table may hold, the first measured first."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(text_of(record.get(name)) for name in names_apart(kind)), []).append(record)
    return found


def names_apart(kind: str) -> tuple[str, ...]:
    """By what lines of a kind stand in tables of their own."""
    return APART.get(kind, MODEL_AND_MACHINE)


def differing(records: Sequence[Record]) -> list[str]:
    """Settings in which some of the lines differ, in the order of the lines."""
    values: dict[str, set[str]] = {}
    found = [settings(record) for record in records]
    for name in dict.fromkeys(chain.from_iterable(found)):
        values[name] = {text_of(one.get(name)) for one in found}
    return [name for name, seen in values.items() if len(seen) > 1]


def labelled(records: Sequence[Record], over: Collection[str]) -> dict[str, list[Record]]:
    """Method, and what else tells it from another line of a picture -> its newest records, which differ ``over`` these
    fields only."""
    lines: dict[str, list[Record]] = {}
    for record in newest(records):
        lines.setdefault(identity(record, over), []).append(record)
    found = {}
    for mine in lines.values():
        method = mine[0]["method"]
        alike = [other[0] for other in lines.values() if other[0]["method"] == method]
        names = [name for name in differing(alike) if name not in over]
        known = settings(mine[0])
        about = ", ".join(f"{title_of(name)} {text_of(known[name])}" for name in names if name in known)
        found[f"{method} ({about})" if about else method] = mine
    return found


def commit_of(record: Record) -> str:
    """The code that was measured: rows of one table may differ in it."""
    return f"{record.get('commit') or ''}{' with changes' if record.get('dirty') else ''}"


def title_of(name: str) -> str:
    """What a reader is shown for the name of a field."""
    return name.replace("_", " ")


def text_of(value: Any) -> str:
    """A value of a field as a table has it; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _plain(value: Any) -> Any:
    """A value without what says when it was, or stands for the method, however deep."""
    if isinstance(value, Mapping):
        inner = {name: _plain(one) for name, one in value.items() if name not in WHEN | GIVEN}
        return {name: one for name, one in inner.items() if one is not None and one not in ({}, [])}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _read_by_nobody(record: Record) -> tuple[str, ...]:
    """Settings of a read that a line of `bench ops` has for every method: dense ops look at none of them, and where
    there is a compression, k is its."""
    method = str(record.get("method"))
    if method.partition("+")[0] in ("vllm", DENSE, *FORMATS):
        return "r", "k", "compression", "ranking"
    if method.startswith("write"):  # of the ranking copy too
        return "r", "k", "compression"
    return ("k",) if record.get("compression") is not None else ()
