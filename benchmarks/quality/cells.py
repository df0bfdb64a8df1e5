"""From scores to cells: means with bootstrap intervals, differences from dense prompt by prompt, the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.tasks.generated import TASKS
from vllm_sparq.benchmarks.tasks.metrics import MEASURED
from vllm_sparq.benchmarks.tasks.retrieval import RETRIEVAL

GENERATED = (*TASKS, *RETRIEVAL)

N_RESAMPLES = 2000
CONFIDENCE = 0.95

FLOOR = 50.0
"""Points that dense must reach at a generated task. Below, the model cannot do it: what a method loses says nothing."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, from a fixed seed: the same values give the same interval.

    Scores that are all alike give an interval without width, however few they are; n stands beside it.
    """
    drawn = np.random.default_rng(0).integers(0, len(values), (N_RESAMPLES, len(values)))
    means = np.asarray(values, dtype=np.float64)[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def cells(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per task, length and method, dense first, from the lines of single examples.

    Scores are points of 100; measured metrics stay in their unit. A difference pairs a method's example with dense's of
    the same prompt.
    """
    groups: dict[tuple[str, int | None], dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        by_method = groups.setdefault((line["task"], line["length"]), {})
        by_method.setdefault(line["method"], []).append(line)
    found = []
    for by_method in groups.values():
        dense = {line["prompt_sha"]: line for line in by_method.get(DENSE, [])}
        of_task = [_cell(mine, dense) for mine in by_method.values()]
        found += [{**cell, "beyond_model": True} for cell in of_task] if _is_beyond(of_task) else of_task
    return found


def _is_beyond(of_task: Sequence[dict[str, Any]]) -> bool:
    """Whether dense fails at a generated task."""
    generated = of_task[0]["task"].partition(":")[0] in GENERATED
    return generated and any(
        cell["method"] == DENSE and not cell["lower_is_better"] and cell.get("score", FLOOR) < FLOOR for cell in of_task
    )


def _cell(mine: list[dict[str, Any]], dense: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first = mine[0]
    measured = first["metric"] in MEASURED
    unit = 1 if measured else 100
    scored = [line for line in mine if "skipped" not in line]
    record: dict[str, Any] = dict(
        bench="quality",
        task=first["task"],
        length=first["length"],
        method=first["method"],
        metric=first["metric"],
        lower_is_better=measured,
        n=len(scored),
        n_skipped=len(mine) - len(scored),
        n_cut=sum(line["n_cut_tokens"] > 0 for line in scored),
    )
    if not scored:
        return record
    scores = [unit * line["score"] for line in scored]
    record |= dict(score=float(np.mean(scores)))
    record["low"], record["high"] = interval(scores)
    record["output_tokens"] = float(np.mean([line["output_tokens"] for line in scored]))
    record |= _divergence(scored)
    record["prompt_tokens"] = float(np.mean([line["prompt_tokens"] for line in scored]))
    pairs = [(line, dense[line["prompt_sha"]]) for line in scored if line["prompt_sha"] in dense]
    if first["method"] != DENSE and pairs:
        differences = [unit * (a["score"] - b["score"]) for a, b in pairs]
        record["difference"] = float(np.mean(differences))
        record["difference_low"], record["difference_high"] = interval(differences)
    return record


def _divergence(scored: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of forced answers, how far a method is from dense: nats per token, and the share of changed tops in percent.

    Intervals are of means over examples, since the tokens of one are not independent; the 99th percentile is of tokens.
    """
    measured = [line for line in scored if "divergence" in line]
    if not measured:
        return {}
    means = [float(np.mean(line["divergence"])) for line in measured]
    changed = [100 * line["n_changed"] / len(line["divergence"]) for line in measured]
    found = {"kl": float(np.mean(means)), "changed": float(np.mean(changed))}
    found["kl_low"], found["kl_high"] = interval(means)
    found["changed_low"], found["changed_high"] = interval(changed)
    found["kl_p99"] = float(np.quantile(np.concatenate([line["divergence"] for line in measured]), 0.99))
    return found


def table(records: Sequence[dict[str, Any]]) -> Any:
    """A row per task, length and method; the dense row of each first."""
    from rich import box
    from rich.table import Table

    title = f"Points of 100, bits where measured; {CONFIDENCE:.0%} bootstrap intervals; bytes are times dense's"
    view = Table(title=title, box=box.SIMPLE_HEAD)
    forced = any("kl" in record for record in records)
    divergence = ("KL", "99%", "tops changed") if forced else ()
    for column in ("task", "length", "method", "score", "beside dense", *divergence, "n", "output", "read", "kept"):
        view.add_column(column, justify="left" if column in ("task", "method") else "right")
    before: tuple[Any, Any] | None = None
    dense: dict[str, Any] = {}
    for record in records:
        cell = record["task"], record["length"]
        head = ("", "")
        if cell != before:
            if before is not None:
                view.add_section()
            head, dense = (record["task"], "" if record["length"] is None else f"{record['length']:,}"), record
        score, difference, *rest = _columns(record, dense)
        far = _far(record) if forced else ()
        view.add_row(*head, record["method"], score, difference, *far, *rest)
        before = cell
    skipped = sum(record["n_skipped"] for record in records)
    cut = sum(record["n_cut"] for record in records)
    notes = [f"{skipped} prompts did not fit into the model's context and were skipped"] if skipped else []
    notes += [f"{cut} prompts lost their middle, as their set has it"] if cut else []
    beyond = any("beyond_model" in record for record in records)
    notes += [f"where dense scores below {FLOOR:.0f}, the model cannot do the task, and no method is scored"] * beyond
    notes += ["KL: nats per token beside dense, mean and 99th percentile of tokens"] if forced else []
    view.caption = "; ".join(notes) or None
    return view


def _far(record: dict[str, Any]) -> tuple[str, str, str]:
    if "kl" not in record:
        return ("", "", "")
    ends = f"({record['kl_low']:.4f} .. {record['kl_high']:.4f})"
    return (f"{record['kl']:.4f} {ends}", f"{record['kl_p99']:.3f}", f"{record['changed']:.1f}%")


def _columns(record: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    if "score" not in record:
        return ["skipped", "", "0", "", "", ""]
    if "beyond_model" in record and record["method"] != DENSE:
        return ["the model cannot do this", "", str(record["n"]), "", "", ""]
    digits = 3 if record["lower_is_better"] else 1
    difference = ""
    if "difference" in record:
        ends = f"{record['difference_low']:+.{digits}f} .. {record['difference_high']:+.{digits}f}"
        difference = f"{record['difference']:+.{digits}f} ({ends})"
    return [
        f"{record['score']:.{digits}f} ({record['low']:.{digits}f} .. {record['high']:.{digits}f})",
        difference,
        str(record["n"]),
        f"{record['output_tokens']:.1f}",
        f"{record['kv_bytes_moved'] / dense['kv_bytes_moved']:.2f}x",
        f"{record['kv_bytes_held'] / dense['kv_bytes_held']:.2f}x",
    ]
