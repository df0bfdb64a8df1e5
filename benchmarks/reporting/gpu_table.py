"""The tables of docs/gpu.md: what `gpu_check.py` and `gpu_engine.py` have recorded, or that nothing was measured yet.

Of each kind the lines of one GPU and one commit: those of the newest line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_sparq.benchmarks.common.methods import DENSE

Record = Mapping[str, Any]

NOTHING = "Nothing measured yet: `benchmarks/results` holds no line of a GPU."

MACHINE = ("gpu", "driver", "torch", "triton", "vllm", "commit")
"""What is said above a table, as far as it is known."""

SPARSE = ("sparq", "quest")


def of_newest(records: Sequence[Record], bench: str) -> list[Record]:
    """The lines of a kind, of the GPU and the code of the last of them."""
    found = [record for record in records if record.get("bench") == bench]
    return [r for r in found if all(r.get(name) == found[-1].get(name) for name in ("gpu", "commit"))]


def origin(record: Record) -> str:
    """Such as "NVIDIA H100, driver 580.1, torch 2.13, commit abc"."""
    return ", ".join(f"{'' if name == 'gpu' else name + ' '}{record[name]}" for name in MACHINE if record.get(name))


def gpu_check_rows(records: Sequence[Record]) -> list[str]:
    """How many checks passed, and which did not."""
    found = of_newest(records, "gpu_ops")
    last = {(r["name"], r.get("check")): r for r in found if r.get("kind") in ("check", "graph") or _died(r)}
    if not last:
        return [NOTHING]
    wrong = [r for r in last.values() if "check" in r and not r["error"] <= r["limit"]]
    n_right = sum("check" in r for r in last.values()) - len(wrong)
    lines = ["| checks | passed | failed |", "|---|---|---|", f"| {origin(found[-1])} | {n_right} | {len(wrong)} |"]
    lines += [f"| `{r['name']}`: {r['check']} | | error {r['error']:.2g}, limit {r['limit']} |" for r in wrong]
    return lines + [f"| `{r['name']}` | | {_cell(r['error'])} |" for r in last.values() if _died(r)]


def gpu_decode_rows(records: Sequence[Record]) -> list[str]:
    """Microseconds of a decode step of one layer, a line a cell."""
    found = of_newest(records, "gpu_ops")
    cells = _by_cell([r for r in found if r.get("kind") == "decode" and "median_us" in r])
    if not cells:
        return [NOTHING]
    lines = [
        f"| {origin(found[-1])} | dense | sparse | rival | dense by rival | sparse by rival | host, sparse |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, methods in cells.items():
        dense, sparse = methods["dense"], next(methods[one] for one in SPARSE if one in methods)
        rival = methods[dense["rival"]]
        times = [f"{r['median_us']:,.0f} us" for r in (dense, sparse, rival)]
        ratios = [f"{r['speedup_vs_rival']:.2f}x" for r in (dense, sparse)]
        times[2] += f", {dense['rival']}"
        lines.append(f"| `{name}` | {' | '.join(times)} | {' | '.join(ratios)} | {sparse['host_us']:,.0f} us |")
    return lines


def gpu_prefill_rows(records: Sequence[Record]) -> list[str]:
    """Milliseconds of a chunk of a prompt, a line a cell."""
    found = of_newest(records, "gpu_ops")
    cells = _by_cell([r for r in found if r.get("kind") == "prefill" and "median_us" in r])
    if not cells:
        return [NOTHING]
    heads = "our Triton kernel | rival | by rival | codes restored, with the rival"
    lines = [f"| {origin(found[-1])} | {heads} |", "|---|---|---|---|---|"]
    for name, methods in cells.items():
        ours = methods["prefill"]
        rival = methods[ours["rival"]]
        times = [f"{r['median_us'] / 1e3:,.2f} ms, {r['tflop_per_s']:.0f} TFLOP/s" for r in (ours, rival)]
        both = ""
        if "restore" in methods:
            whole = methods["restore"]["median_us"] + rival["median_us"]
            both = f"{whole / 1e3:,.2f} ms, {rival['median_us'] / whole:.2f}x"
        ratio = f"{ours['speedup_vs_rival']:.2f}x"
        lines.append(f"| `{name}` | {times[0]} | {times[1]}, {ours['rival']} | {ratio} | {both} |")
    return lines


def gpu_engine_rows(records: Sequence[Record]) -> list[str]:
    """A line an engine: its start, its prompts, and its decode steps beside dense with the same settings."""
    found = of_newest(records, "gpu_engine")
    engines: dict[str, dict[Any, Record]] = {}
    for r in found:
        key = "error" if "error" in r else (r.get("what"), r.get("context"))
        if "left_out" not in r and "no_room" not in r:
            engines.setdefault(r["name"], {})[key] = r
    if not engines:
        return [NOTHING]
    keys = {key for lines in engines.values() for key in lines if isinstance(key, tuple) and key[1]}
    columns = sorted(keys, key=lambda key: (key[0] != "prefill", key[1]))
    heads = [f"{'first token of' if what == 'prefill' else 'per token at'} {context:,}" for what, context in columns]
    lines = [
        f"| {origin(found[-1])} | start | cache, tokens | {' | '.join(heads)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for name, mine in engines.items():
        start = mine.get(("start", None))
        cells = ["", ""] if start is None else [f"{start['start_s']:.0f} s", f"{start['kv_capacity_tokens']:,}"]
        cells += [_figure(mine.get(key), _dense_of(name, engines).get(key)) for key in columns]
        if "error" in mine:
            cells[-1] = f"{cells[-1]} died: {_cell(mine['error']['error'])}".strip()
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def _figure(record: Record | None, dense: Record | None) -> str:
    """A time, and how many times as fast as dense it is, of as many requests."""
    if record is None:
        return ""
    kind = "seconds" if record["what"] == "prefill" else "median_tpot_ms"
    text = f"{record[kind]:.2f} s"
    if kind != "seconds":
        text = f"{record['batch']} request{'s' * (record['batch'] > 1)}: {record[kind]:.2f} ms"
    comparable = dense is not None and dense.get("batch") == record.get("batch") and record["method"] != DENSE
    return f"{text}, {dense[kind] / record[kind]:.2f}x" if comparable and dense is not None else text


def _dense_of(name: str, engines: Mapping[str, Mapping[Any, Record]]) -> Mapping[Any, Record]:
    """The lines of dense on the same model, with the same settings, in the same round."""
    model, _, *settings = name.split("/")
    return engines.get("/".join([model, DENSE, *settings]), {})


def _by_cell(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Name of a cell -> method -> its newest line; cells that have all of theirs."""
    cells: dict[str, dict[str, Record]] = {}
    for record in records:
        cells.setdefault(str(record["name"]), {})[str(record["method"])] = record
    return {name: methods for name, methods in cells.items() if all(r["rival"] in methods for r in methods.values())}


def _died(record: Record) -> bool:
    return isinstance(record.get("error"), str)


def _cell(text: str) -> str:
    """A message for one cell of a table."""
    return text.replace("|", "/").replace("\n", " ")[:160]
