"""What an offline run on a pool of replicas achieved, as fields of a record and as a table."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

from vllm_sparq.benchmarks.cluster.answers import Answers
from vllm_sparq.benchmarks.cluster.replicas import Pool
from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.proof import WrongAttentionError, speed_note
from vllm_sparq.benchmarks.common.records import comparable


def summary(pool: Pool, answers: Answers, took: float | None) -> dict[str, Any]:
    """Rates of all rows in the folder, together and replica by replica, and the code and machines that made them.

    Args:
        took: seconds from the start of the engines, if one run made all the rows.

    Raises:
        WrongAttentionError: rows were made by more than one kind of attention.
    """
    replicas: dict[str, dict[str, Any]] = defaultdict(lambda: {"rows": 0, "tokens": 0, "first": [], "last": []})
    classes: Counter[str] = Counter()
    origins: dict[str, set[str]] = defaultdict(set)
    n_preempted = 0
    lengths: Counter[int] = Counter()
    columns = ["n_prompt_tokens", "n_tokens", "started", "finished", "preemptions", "attention", "replica", "origin"]
    for row in answers.rows(columns):
        mine = replicas[row["replica"]]
        mine["rows"] += 1
        mine["tokens"] += row["n_tokens"]
        mine["first"] = min(mine["first"] or row["started"], row["started"])
        mine["last"] = max(mine["last"] or row["finished"], row["finished"])
        classes[row["attention"]] += 1
        origins[row["origin"]].add(row["replica"])
        lengths[row["n_prompt_tokens"]] += 1
        n_preempted += row["preemptions"]
    if len(classes) != 1:
        raise WrongAttentionError(f"rows of {pool.method.name} were made by {', '.join(classes) or 'nothing'}")
    n_rows, n_tokens = (sum(one[what] for one in replicas.values()) for what in ("rows", "tokens"))
    n_prompt = sum(length * n for length, n in lengths.items())
    # Sittings of a run that was resumed do not overlap: count the time in which any replica worked.
    busy = covered([(one["first"], one["last"]) for one in replicas.values()])
    return {
        **machines_of(origins),
        "attention": next(iter(classes)),
        "began": min(one["first"] for one in replicas.values()),
        "seconds": round(busy, 3),
        "wall_seconds": took and round(took, 3),
        "requests_per_second": round(n_rows / busy, 3),
        "tokens_per_second": round((n_prompt + n_tokens) / busy, 3),
        "output_tokens_per_second": round(n_tokens / busy, 3),
        "n_prompt_tokens": n_prompt,
        "prompt_tokens": {"least": min(lengths), "most": max(lengths)},
        "n_output_tokens": n_tokens,
        "preemptions": n_preempted,
        "per_replica": {
            name: {
                "rows": one["rows"],
                "output_tokens": one["tokens"],
                "output_tokens_per_second": round(one["tokens"] / max(one["last"] - one["first"], 1e-9), 3),
            }
            for name, one in sorted(replicas.items())
        },
    }


def machines_of(origins: dict[str, set[str]]) -> dict[str, Any]:
    """The fields that say where and with which code: of the replicas, and not of the machine that handed out the rows.

    Args:
        origins: what `replicas.origin` said -> names of the replicas that said so.

    Returns:
        Each field once, with a plus between what differs; and ``machines``, the kinds with their numbers of replicas.
    """
    kinds = [json.loads(text) | {"replicas": len(names)} for text, names in sorted(origins.items())]
    fields: dict[str, Any] = {}
    for name in dict.fromkeys(name for kind in kinds for name in kind if name != "replicas"):
        values = list(dict.fromkeys(kind.get(name) for kind in kinds))
        fields[name] = values[0] if len(values) == 1 else " + ".join(map(str, values))
    return {**fields, "machines": kinds}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return max(total, 1e-9)


def table(records: list[dict[str, Any]]) -> Any:
    """A row per method: rates beside dense, the attention that ran, and how the rows were shared out."""
    from rich.table import Table

    one = records[0]
    view = Table(title=f"{one['rows']:,} prompts of {one['model']} on {one['replicas']} replicas ({one['runner']})")
    for column in ("method", "attention", "output tokens/s", "beside dense", "rows per replica", "preempted"):
        view.add_column(column, justify="left" if column in ("method", "attention") else "right")
    dense = next((r for r in records if r["method"] == DENSE), None)
    for record in sorted(records, key=lambda r: r["method"] != DENSE):
        view.add_row(
            record["method"],
            record["attention"],
            f"{record['output_tokens_per_second']:,.1f}",
            beside(record, dense),
            " + ".join(str(replica["rows"]) for replica in record["per_replica"].values()),
            str(record["preemptions"]),
        )
    return view


def beside(record: dict[str, Any], dense: dict[str, Any] | None) -> str:
    """The rate over dense's, if the same code made both on the same machines."""
    if dense is None:
        return ""
    if not comparable(record, dense):
        return "other code or machine"
    return speed_note(record["output_tokens_per_second"] / dense["output_tokens_per_second"])
