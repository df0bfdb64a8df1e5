"""What a line of results is a measurement of: by this lines are told apart, paired with dense, and drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_sparq.benchmarks.common.records import dense_beside

Record = dict[str, Any]

SETTINGS = (
    *("bench", "command", "model", "weights", "fingerprint", "dtype", "seed", "temperature", "ignore_eos"),
    *("heads", "kv_heads", "head_dim", "context", "chunk", "batch", "clock", "steps", "rounds"),
    *("task", "length", "text", "n", "n_wanted"),
    *("rate", "num_prompts", "max_concurrency", "burstiness", "input_len", "output_len", "prompt_len"),
    *("pool", "kv_cache_bytes", "kv_cache_mib", "engine_args", "serve_args"),
    *("replicas", "runner", "rows", "data", "source", "cpus_per_replica", "gpus_per_replica", "batch_size", "address"),
)
"""What is asked of every method alike."""

METHOD = ("method", "options", "arguments", "engine_arguments", "block_size", "ranking", "r", "k", "compression")
"""What is asked of one."""

MACHINE = ("cpu", "isa", "gpu", "threads")

ALIKE = {
    "engine": ("model", "weights", "dtype", "commit", *MACHINE),
    "serve": ("model", "weights", "rate", "num_prompts", "input_len", "output_len", "serve_args", *MACHINE),
    "ray": ("model", "fingerprint", "runner", "rows", "data", "input_len", "output_len", *MACHINE),
    "ops": ("heads", "kv_heads", "head_dim", "batch", "dtype", "clock", "compression", "ranking", *MACHINE),
    "quality": ("model", "dtype", "n_wanted", "text", "seed"),
}
"""Kind of line -> what lines of one picture share."""


def identity(record: Record) -> str:
    """The same for two lines that measured the same, of whatever code; answers also on whatever machine."""
    machine = () if record.get("bench") == "quality" else MACHINE
    return repr([record.get(name) for name in (*SETTINGS, *METHOD, *machine)])


def dense_of(record: Record, records: Sequence[Record]) -> Record | None:
    """The newest line of dense that was asked the same, of the same code on the same machine; None if there is none."""
    alike = [other for other in records if _of_engine(other) == _of_engine(record)]
    found = dense_beside(record, alike, SETTINGS)
    return None if found is None else dict(found)


def _of_engine(record: Record) -> dict[str, Any]:
    """What a user told the engines of all methods, where a line has only what each engine was given."""
    own = ("attention_backend", "additional_config", "worker_extension_cls")
    return {name: value for name, value in record.get("engine_arguments", {}).items() if name not in own}


def most_alike(kind: str, records: Sequence[Record]) -> list[Record]:
    """Those of a kind that one picture may show: of the case, and the machine, that most of them share."""
    cases = [repr([record.get(name) for name in ALIKE[kind]]) for record in records]
    return [record for record, case in zip(records, cases, strict=True) if case == max(cases, key=cases.count)]


def told(kind: str, records: Sequence[Record]) -> str:
    """What the lines of a picture share, in words; empty if nothing is known."""
    first = records[0]
    named = {name: first[name] for name in ALIKE[kind] if first.get(name) not in (None, [], {})}
    return ", ".join(f"{value}" if isinstance(value, str) else f"{name} {value}" for name, value in named.items())
