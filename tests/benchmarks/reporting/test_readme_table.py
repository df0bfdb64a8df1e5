"""The tables of the documents are those of the recorded results."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.reporting.readme_table import DOCUMENTS, RESULTS, TABLES, engine_rows, filled


def engine(method: str, speed: float, bound: float = 2.0) -> dict[str, object]:
    case = {"bench": "engine", "context": 8192, "batch": 4, "amdahl_bound": bound}
    return case | {
        "method": method,
        "median_tpot_ms": 100 / speed,
        "speedup_vs_vllm": speed,
        "share_of_bound": speed / bound,
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_was_measured(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    again = filled(text, DOCUMENTS[path], read_records(RESULTS))
    assert again == text, "run python -m vllm_sparq.benchmarks.reporting.readme_table"


def test_a_figure_that_was_not_measured_does_not_stay() -> None:
    records = read_records(RESULTS)
    for path, names in DOCUMENTS.items():
        text = path.read_text(encoding="utf-8")
        for name in names:
            start = text.index(f"<!-- {name} -->")
            digit = next(i for i in range(text.index("|---", start), len(text)) if text[i].isdigit())
            wrong = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
            assert wrong != filled(wrong, names, records) == text
    with pytest.raises(ValueError, match="no place for the table 'engine'"):
        filled("# nothing", ["engine"], records)


def test_every_table_has_its_document() -> None:
    assert sorted(name for names in DOCUMENTS.values() for name in names) == sorted(TABLES)


def test_the_newest_run_counts_and_another_run_brings_its_own_bound() -> None:
    sparq = 'sparq {"r": 16, "k": 128}'
    lines = engine_rows([engine(sparq, 1.2), engine(sparq, 1.5), engine("kivi", 0.8), engine("h2o", 1.6, bound=1.7)])
    assert lines[2:] == ["| 8k | 4 | 100.0 ms | 66.7 ms, **1.50x** | 75% |  | 0.80x | 1.60x (of 1.70x) | 2.00x |"]
