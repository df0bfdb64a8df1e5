"""The tables of the documents are those of the recorded results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.reporting.gpu_table import NOTHING
from vllm_sparq.benchmarks.reporting.isa_table import isa_rows
from vllm_sparq.benchmarks.reporting.methods_table import LAYER
from vllm_sparq.benchmarks.reporting.prefill_table import prefill_rows
from vllm_sparq.benchmarks.reporting.readme_table import (
    DOCUMENTS,
    RESULTS,
    TABLES,
    TASKS,
    engine_rows,
    filled,
    lossless_rows,
    memory_rows,
    quality_rows,
)


def engine(method: str, speed: float, bound: float = 2.0) -> dict[str, object]:
    case = {"bench": "engine", "context": 8192, "batch": 4, "amdahl_bound": bound, "block_size": 128, "options": {}}
    return case | {
        "method": method,
        "median_tpot_ms": 100 / speed,
        "speedup_vs_vllm": speed,
        "share_of_bound": speed / bound,
    }


def measured(path: Path) -> list[str]:
    """The tables of a document that hold figures; those of a GPU may not, and say so."""
    text = path.read_text(encoding="utf-8")
    parts = {name: text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0] for name in DOCUMENTS[path]}
    empty = [name for name, part in parts.items() if "|---" not in part]
    assert all(name.startswith("gpu-") and parts[name].strip() == NOTHING for name in empty)
    return [name for name in parts if name not in empty]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_was_measured(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    again = filled(text, DOCUMENTS[path], read_records(RESULTS))
    assert again == text, "run vllm-sparq report --documents"


def test_a_figure_that_was_not_measured_does_not_stay() -> None:
    records = read_records(RESULTS)
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for name in (names := measured(path)):
            start = text.index(f"<!-- {name} -->")
            digit = next(i for i in range(text.index("|---", start), len(text)) if text[i].isdigit())
            wrong = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
            assert wrong != filled(wrong, names, records) == text
    with pytest.raises(ValueError, match="no place for the table 'engine'"):
        filled("# nothing", ["engine"], records)


@pytest.mark.parametrize("changed", [{"dirty": True}, {"dirty": None}])
def test_a_line_of_uncommitted_changes_reaches_no_table(changed: dict[str, object]) -> None:
    """Every figure of every line is spoilt in a copy that is newer and not clean; not a character changes."""
    records = read_records(RESULTS)
    spoilt = [{name: 7 * v if type(v) is float else v for name, v in record.items()} | changed for record in records]
    for path, names in DOCUMENTS.items():
        text = path.read_text(encoding="utf-8")
        assert filled(text, names, [*records, *spoilt]) == text
        clean = [{**line, "dirty": False} for line in spoilt]
        assert (filled(text, names, [*records, *clean]) != text) == bool(measured(path))


def test_another_model_and_other_requests_reach_no_table() -> None:
    """Spoilt copies that are newer: answers of another model, its time per token, and a trace with other arguments."""

    def is_copied(record: dict[str, Any]) -> bool:
        toy = record.get("bench") == "quality" and record["task"] in TASKS
        return toy or (record.get("bench") == "engine" and not record["options"].get("lossless"))

    records = read_records(RESULTS)
    spoilt = [{k: 7 * v if type(v) is float else v for k, v in r.items()} for r in records if is_copied(r)]
    others = [record | {"model": "another"} for record in spoilt]
    trace = next(r for r in records if r.get("bench") == "pressure" and r["output_len"] == 700)
    others.insert(0, trace | {"n": 5, "request_throughput": 1e6, "method": "another"})
    for path, names in DOCUMENTS.items():
        text = path.read_text(encoding="utf-8")
        assert filled(text, names, [*others, *records]) == text
        assert filled(text, names, [*records, *others[1:]]) == text


def test_no_ratio_of_two_commits_machines_or_instruction_sets() -> None:
    case = {"bench": "requests", "command": "throughput", "model": "m", "input_len": 8, "output_len": 8}
    case |= {"num_prompts": 2, "kv_cache_bytes": 1 << 20, "sparq": {"max_concurrency": 2.0}}
    origin = {"commit": "a", "dirty": False, "cpu": "c", "isa": "avx2"}
    dense = {**case, **origin, "method": "dense", "tokens_per_second": 100.0}
    kivi = {**case, **origin, "method": "kivi", "tokens_per_second": 150.0}
    assert memory_rows([dense, kivi])[-1] == "| `kivi` | 150 tokens/s, **1.50x**; 2.0 at a time |"
    for change in ({"commit": "b"}, {"cpu": "d"}, {"isa": "avx512"}):
        assert not any("x**" in line for line in memory_rows([dense, kivi | change]))


def test_a_chunk_has_columns_for_what_was_measured_with_vllms_op() -> None:
    """The newest line of each instruction set and context; another chunk or layer is not among them."""
    one = {"bench": "ops_prefill", "isa": "avx2", "context": 0, "chunk": 2048, **LAYER, "share_of_bound": 0.8}
    vllm, dense = one | {"method": "vllm", "median_us": 3e5}, one | {"method": "dense", "speedup_vs_vllm": 2.0}
    other = dense | {"chunk": 512, "speedup_vs_vllm": 9.0}
    without = dense | {"isa": "avx512", "speedup_vs_vllm": 9.0}
    lines = prefill_rows([vllm, dense | {"speedup_vs_vllm": 1.0}, dense, other, without, dense | {"heads": 8}])
    assert lines == ["| | AVX2: 0 |", "|---|---|", "| vLLM (CPU_ATTN) | 300 ms |", "| our op | 2.00x, 80% |"]


def test_lesser_instruction_sets_have_columns_of_their_own() -> None:
    """SparQ as in its paper; the newest line of each, and what was not measured stays empty."""
    one = {"bench": "ops", "isa": "avx2", "context": 1024, **LAYER, "r": 32, "k": 128}
    vllm, int8 = one | {"method": "vllm", "median_us": 500.0}, one | {"method": "int8", "speedup_vs_vllm": 1.7}
    later = [record | {"context": 4096} for record in (vllm, vllm | {"isa": "avx512"})]
    others = [int8 | {"isa": "avx512_bf16"}, int8 | {"k": None}, int8 | {"heads": 8}]
    lines = isa_rows([vllm, int8 | {"speedup_vs_vllm": 9.0}, int8, *later, *others], {"`int8`": "int8", "x": "y"})
    assert lines == [
        "| | AVX2: 1,024 | 4,096 | AVX-512: 4,096 |",
        "|---|---|---|---|",
        "| vLLM (CPU_ATTN) | 0.50 ms | 0.50 ms | 0.50 ms |",
        "| `int8` | 1.7x |  |  |",
    ]


def test_blocks_that_an_engine_would_not_choose_reach_no_table() -> None:
    sparq = engine('sparq {"r": 16, "k": 128}', 1.2)
    assert engine_rows([sparq, sparq | {"block_size": 256, "speedup_vs_vllm": 9.0}]) == engine_rows([sparq])


def test_every_table_has_its_document() -> None:
    assert sorted(name for names in DOCUMENTS.values() for name in names) == sorted(TABLES)


def test_capped_positions_are_lm_infinite_among_the_answers() -> None:
    """Other options than these, and methods that are not measured at all tasks, have no line there."""
    case = {
        "bench": "quality",
        "length": 1024,
        "score": 50.0,
        "low": 40.0,
        "high": 60.0,
        "model": "weights",
        "dirty": False,
    }
    case |= {"kv_bytes_moved": 100, "kv_bytes_held": 100}
    capped = 'streaming 1/2 {"positions": "capped", "budget": 512}'
    methods = ("dense", capped, 'streaming 1/2 {"budget": 512}', "sparq+int4 1/8")
    lines = quality_rows([{**case, "task": task, "method": method} for method in methods for task in TASKS])
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| dense", "| streaming 1/2, capped (LM-Infinite)"]
    assert quality_rows([{**case, "task": "needle", "method": capped}])[2:] == []


def test_the_newest_run_counts_and_another_run_brings_its_own_bound() -> None:
    sparq = 'sparq {"r": 16, "k": 128}'
    lines = engine_rows([engine(sparq, 1.2), engine(sparq, 1.5), engine("kivi", 0.8), engine("h2o", 1.6, bound=1.7)])
    assert lines[2:] == ["| 8k | 4 | 100.0 ms | 66.7 ms, **1.50x** | 75% |  |  | 0.80x | 1.60x (of 1.70x) | 2.00x |"]


def test_engines_that_draft_have_a_table_of_their_own() -> None:
    drafting = engine('sparq {"lossless": true}', 2.0) | {"model": "m", "options": {"lossless": True}}
    drafting |= {"tokens_per_step": 2.9, "acceptance": [0.98, 0.9]}
    lines = lossless_rows([engine("dense", 1.0), drafting | {"speedup_vs_vllm": 9.0}, drafting])
    assert lines[2:] == ["| m | 8,192 | 4 | 100.0 ms | 50.0 ms, **2.00x** | 2.90 | 0.98 0.90 |"]
