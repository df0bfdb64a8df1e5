"""docs/figures are what the recorded results say."""

from __future__ import annotations

import re

import pytest

from tests.docs.markdown import ROOT
from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.reporting import figures

pytest.importorskip("matplotlib", reason="pictures need matplotlib (pip install matplotlib)")


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_what_was_measured(name: str) -> None:
    import matplotlib as mpl

    locked = re.search(r"^matplotlib==(\S+)", (ROOT / "requirements" / "cpu.lock").read_text(), flags=re.M)
    assert locked
    if mpl.__version__ != locked.group(1):
        pytest.skip(f"another matplotlib ({mpl.__version__}) draws the same figure in other bytes")
    text = (figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    records = read_records(figures.RESULTS)
    assert text == figures.drawn(name, records), "run vllm-sparq report --documents"


def test_no_figure_is_left_over() -> None:
    assert {path.stem for path in figures.FOLDER.iterdir()} == set(figures.FIGURES)


def test_dirty_lines_and_other_batches_are_not_shown() -> None:
    case = {"bench": "engine", "method": figures.SPARQ, "context": 8192, "batch": figures.BATCH, "amdahl_bound": 3.0}
    line = {**case, "speedup_vs_vllm": 2.0, "dirty": False}
    wrong = [{**line, "speedup_vs_vllm": 9.0, **changed} for changed in ({"dirty": True}, {"batch": 1})]
    lines, bound = figures.speed_lines([line, *wrong])
    assert lines["SparQ, fixed"] == [(8192, 2.0)]
    assert bound == [(8192, 3.0)]
