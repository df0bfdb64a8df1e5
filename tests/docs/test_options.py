"""docs/options.md is what the code says of its options."""

from __future__ import annotations

import pytest

from tests.docs.markdown import ROOT
from vllm_sparq.backends import PRESETS
from vllm_sparq.benchmarks.reporting import options_page
from vllm_sparq.config import Options
from vllm_sparq.formats import FORMATS
from vllm_sparq.reads import READS
from vllm_sparq.retention import RETENTIONS

NAMED = {
    "how-it-works.md": {*READS, *FORMATS, *RETENTIONS, *PRESETS},
    "evaluation.md": {*FORMATS, *PRESETS} - {"model"},
}
"""Page -> rows of the tables that it explains."""


def test_the_page_is_what_the_code_says() -> None:
    text = options_page.PAGE.read_text(encoding="utf-8")
    assert text == options_page.page(), "run vllm-sparq report --documents"


def test_every_option_has_its_place() -> None:
    placed = [name for _, names in options_page.SECTIONS.values() for name in names]
    assert sorted(placed) == sorted(Options.model_fields)
    dials = {name for read in READS.values() for name in read.dials}
    assert set(options_page.APPLIES) | dials == set(placed)
    assert not set(options_page.APPLIES) & dials
    assert all(f"### `{name}`" in options_page.page() for name in placed)


@pytest.mark.parametrize("page", NAMED)
def test_every_row_of_an_axis_is_explained(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    missing = sorted(name for name in NAMED[page] if f"`{name}`" not in text)
    assert not missing, f"docs/{page} does not say what these are: {missing}"


def test_values_in_words() -> None:
    properties = Options.model_json_schema()["properties"]
    said = {name: options_page.values(properties[name]) for name in ("chunk", "k", "mass", "dense_below", "budget")}
    assert said == {
        "chunk": '`"codes"`, `"exact"`',
        "k": "a whole number >= 1",
        "mass": "a number > 0 and < 1",
        "dense_below": '`"auto"`, or a whole number >= 0',
        "budget": "a whole number >= 1, or a number > 0 and <= 1",
    }
