"""What a report sets beside each other: the same case, of the same code and machine, and nothing else."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.reporting import page as report
from vllm_sparq.benchmarks.reporting import plots

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
ORIGIN = {"commit": "abc", "dirty": False, "cpu": "c", "cores": 2, "isa": "avx2"}


def rows_of(section: str, records: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of the tables of a section, in what is on the page."""
    page, _ = report.build([ORIGIN | record for record in records])
    part = page.split(f"<h2 id='{section}'>")[1].split("<h2 ")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", part, flags=re.DOTALL)]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in rows if row]


def serve(method: str, rate: float, **asked: Any) -> dict[str, Any]:
    server = {"kv_capacity_tokens": 1000, "max_concurrency": 2.5, "preemptions": 3, "attention": f"of {method}"}
    served = {
        "output_throughput": rate,
        "mean_ttft_ms": 1.0,
        "mean_tpot_ms": 2.0,
        "p99_itl_ms": 3.0,
        "model_id": method,
    }
    return {"bench": "serve", "model": "m", "method": method, "rate": "inf", **served, "sparq": server, **asked}


def pressure(method: str, rate: float, **asked: Any) -> dict[str, Any]:
    trace = {"n": 8, "rate": 2.0, "prompt_len": 100, "output_len": 50, "pool": 4.0, "seed": 0}
    found = {"p99_ttft_ms": 5.0, "p99_tpot_ms": 6.0, "kv_capacity_tokens": 9, "preemptions": 0, "attention": method}
    return {"bench": "pressure", "model": "m", "method": method, "request_throughput": rate, **trace, **found, **asked}


def ray(method: str, rate: float, **asked: Any) -> dict[str, Any]:
    pool = {"replicas": 2, "runner": "data", "rows": 8, "attention": method, "per_replica": {"a": {"rows": 8}}}
    return {"bench": "ray", "model": "m", "method": method, "output_tokens_per_second": rate, **pool, **asked}


def engine(method: str, context: int, ms: float, **asked: Any) -> dict[str, Any]:
    found = {"median_tpot_ms": ms, "speedup_vs_vllm": 1.5, "share_of_bound": 0.5, "attention": method}
    return {"bench": "engine", "model": "m", "method": method, "context": context, "batch": 1, **found, **asked}


def op(method: str, us: float, **asked: Any) -> dict[str, Any]:
    layer = {"context": 1024, "batch": 1, "heads": 8, "kv_heads": 2, "head_dim": 64, "r": 32, "k": 128}
    found = {"median_us": us, "gb_per_s": 20.0, "bandwidth_gb_per_s": 60.0, "speedup_vs_vllm": us}
    return {"bench": "ops", "method": method, "dtype": "bfloat16", **layer, **found, **asked}


def answers(method: str, model: str, read: float, **asked: Any) -> dict[str, Any]:
    cell = {"task": "needle", "length": 512, "n": 5, "metric": "begins", "lower_is_better": False, "score": 90.0}
    cell |= {"kv_bytes_moved": read, "kv_bytes_held": read, "low": 80.0, "high": 95.0}
    return {"bench": "quality", "method": method, "model": model, "dtype": "float32", **cell, **asked}


@pytest.mark.parametrize(
    ("make", "section", "one", "other"),
    [
        (serve, "serve", {"num_prompts": 16}, {"num_prompts": 256}),
        (serve, "serve", {"max_concurrency": None}, {"max_concurrency": 4}),
        (serve, "serve", {"goodput": ["ttft:200"]}, {}),
        (serve, "serve", {"serve_args": []}, {"serve_args": ["--max-num-seqs", "4"]}),
        (pressure, "pressure", {"engine_args": {"max_num_seqs": 4}}, {"engine_args": {"max_num_seqs": 64}}),
        (pressure, "pressure", {"n": 8}, {"n": 16}),
        (ray, "ray", {"data": "ab"}, {"data": "cd"}),
        (ray, "ray", {"engine_arguments": {"kv_cache_memory_bytes": 1 << 20}}, {"engine_arguments": {}}),
        (ray, "ray", {"a_new_setting": 1}, {"a_new_setting": 2}),
        (ray, "ray", {"gpu": "NVIDIA H100"}, {"gpu": "NVIDIA H200"}),
    ],
)
def test_a_ratio_is_of_one_case(make: Any, section: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    lines = [make("dense", 100.0, **one), make("sparq", 90.0, **one)]
    lines += [make("dense", 400.0, **other), make("sparq", 380.0, **other)]
    for mixed in (lines, lines[2:] + lines[:2], [lines[i] for i in (0, 2, 1, 3)]):
        rows = rows_of(section, mixed)
        assert len(rows) == 4
        ratios = {cell.split("x")[0] for row in rows for cell in row if re.match(r"\d+\.\d\dx", cell)}
        assert ratios == {"1.00", "0.90", "0.95"}
    alone = rows_of(section, [lines[1], lines[2]])
    assert [any(cell == "no dense run of this case" for cell in row) for row in alone].count(True) == 1


def test_what_an_engine_is_given_for_its_method_is_no_other_case() -> None:
    given = {"kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 4}
    dense = given | {"worker_extension_cls": "x.Report"}
    ours = given | {"attention_backend": "SPARQ", "additional_config": {"sparq": {"format": "int4"}}}
    lines = [ray("dense", 100.0, engine_arguments=dense), ray("int4", 120.0, engine_arguments=ours, options={"a": 1})]
    assert any("1.20x" in row for row in rows_of("ray", lines))


def test_another_run_of_dense_does_not_take_a_ratio_away() -> None:
    """That of the newer code is in the table, and the method's ratio is still of the code that it ran with."""
    lines = [serve("dense", 100.0), serve("sparq", 120.0), serve("dense", 300.0, commit="def")]
    rows = rows_of("serve", lines)
    assert len(rows) == 2
    assert any("1.20x" in row and "sparq" in row for row in rows)


def test_a_line_from_before_a_field_gives_way_to_a_newer_one() -> None:
    old = {name: value for name, value in (ORIGIN | serve("dense", 1.0)).items() if name not in ("isa", "cores")}
    new = ORIGIN | serve("dense", 2.0)
    assert report.newest([old, new]) == [new]
    assert report.newest([new, old]) == [new, old]
    assert report.newest([old, new | {"max_concurrency": 4}]) == [old, new | {"max_concurrency": 4}]


def test_two_models_have_rows_and_shares_of_their_own() -> None:
    lines = [answers("dense", "a", 750.0), answers("sparq", "a", 75.0), answers("dense", "b", 100.0)]
    page, pictures = report.build([ORIGIN | line for line in lines])
    assert page.count("<table>") == 3
    assert "<h3>a</h3>" in page
    assert {"quality-bytes", "quality-bytes-2"} <= pictures.keys()
    for axis in plots.quality_bytes([ORIGIN | line for line in lines]).axes:
        shares = {line.get_label(): list(line.get_xdata()) for line in axis.lines}  # type: ignore[arg-type]
        assert [share for label, found in shares.items() if "dense" in str(label) for share in found] == [1.0, 1.0]
        assert sorted(share for found in shares.values() for share in found) == [0.1, 1.0, 1.0]


def test_bits_have_decimals_and_are_not_among_scores() -> None:
    bits = {"task": "text", "metric": "bits_per_byte", "lower_is_better": True, "score": 1.0572, "low": 1.0}
    bits |= {"high": 1.1, "difference": 0.0040, "difference_low": 0.0012, "difference_high": 0.0141}
    lines = [answers("sparq", "a", 75.0, **bits), answers("dense", "a", 750.0, **bits)]
    (row, *_) = rows_of("quality", lines)
    page, pictures = report.build([ORIGIN | line for line in lines])
    assert "quality-bytes" not in pictures
    assert "1.057" in page
    assert "+0.004" in page
    assert "+0.001 .. +0.014" in page
    assert "sparq" in row


def test_machines_settings_and_models_share_no_line() -> None:
    """Neither a table's fit, nor a picture's line."""
    lines = [engine(m, 1024 * x, x * ms) for m, ms in (("dense", 4.0), ("sparq", 1.0)) for x in (1, 2, 4)]
    slower = [line | {"cpu": "d", "median_tpot_ms": 10 * line["median_tpot_ms"]} for line in lines]
    rows = rows_of("engine", lines + slower)
    fits = {cell.split(",")[0] for row in rows for cell in row if re.match(r"\d+\.\d\d(,|$)", cell)}
    assert fits == {"4.00", "1.00", "40.00", "10.00"}

    ops = [op("sparq", 4.0), op("sparq", 2.0, isa="avx512"), op("sparq", 8.0, r=16), op("sparq", 16.0, heads=16)]
    axis = plots.ops_speed([ORIGIN | line for line in ops]).axes[0]
    points = {str(line.get_label()): list(line.get_ydata()) for line in axis.lines}  # type: ignore[arg-type]
    assert sorted(y for label, (y, *_) in points.items() if label.startswith("sparq")) == [2.0, 4.0, 8.0, 16.0]


def test_what_a_method_does_not_look_at_makes_no_other_row() -> None:
    lines = [op("dense", 4.0), op("dense", 5.0, r=16, k=512), op("sparq", 4.0), op("sparq", 5.0, r=16, k=512)]
    rows = rows_of("ops", lines)
    assert [row.count("dense") for row in rows].count(1) == 1
    assert [row.count("sparq") for row in rows].count(1) == 2


def test_every_row_says_what_it_is_of() -> None:
    """Of the results of this repository, no two rows of a table are called the same."""
    from vllm_sparq.benchmarks.reporting.runs import apart, kind_of, names_apart
    from vllm_sparq.benchmarks.reporting.tables import KINDS, tabulate

    records = read_records(RESULTS)
    for kind in KINDS:
        lines = [record for record in records if kind_of(record) == kind]
        for mine in apart(kind, lines).values():
            table = tabulate(kind, mine, lines, names_apart(kind))
            called = [tuple(row[: table.n_called]) for row in table.rows]
            assert len(set(called)) == len(called), kind
    assert {kind_of(record) for record in records} - KINDS.keys() == {"mixed", "kivi_simulation"}
