"""The worked example of how large a KV cache to ask for is what the pages come to."""

from __future__ import annotations

import pytest
import torch

from tests.docs.commands import options_problem
from tests.docs.markdown import ROOT, table_rows
from vllm_sparq.attention_backends.engine import page_layout, preferred_block_size
from vllm_sparq.benchmarks.engine.cases import LLAMA_1B
from vllm_sparq.config import parse_options
from vllm_sparq.reads import HeadShape

N_LAYERS, N_REQUESTS, N_TOKENS = 16, 8, 8192
METHODS = {
    "dense": ("kivi", {"format": "model"}),
    "`sparq`": ("sparq", {}),
    "`flexgen`": ("flexgen", {}),
    '`sparq`, `{"format": "int4"}`': ("sparq", {"format": "int4"}),
}
HEADS = HeadShape(
    head_size=LLAMA_1B["head_dim"],
    n_heads=LLAMA_1B["num_attention_heads"],
    n_kv_heads=LLAMA_1B["num_key_value_heads"],
)
SECTION = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").split("\n## The size of the cache\n")[-1]
ROWS = {cells[0]: cells[1:] for cells in table_rows(SECTION.split("\n## ")[0])}


def test_the_rows_are_those_methods() -> None:
    assert list(ROWS) == list(METHODS)
    assert options_problem({"format": "int4"}, "sparq") is None


@pytest.mark.parametrize("name", METHODS)
def test_the_numbers_are_the_pages(name: str) -> None:
    backend, given = METHODS[name]
    options = parse_options({"sparq": given}, backend)
    block_size = preferred_block_size(options, N_TOKENS)
    layout = page_layout(options, HEADS, block_size, torch.bfloat16)
    n_blocks = N_TOKENS // block_size + layout.n_staging_blocks
    block_bytes = layout.page_bytes * HEADS.n_kv_heads * N_LAYERS
    assert ROWS[name] == [
        str(layout.bytes_per_token),
        f"{N_TOKENS // block_size}" + (f" + {layout.n_staging_blocks}" if layout.n_staging_blocks else ""),
        f"{block_bytes:,}",
        f"{(N_REQUESTS * n_blocks + 1) * block_bytes:,}",
    ]


def test_the_example_is_about_that_model() -> None:
    assert f"{N_LAYERS} layers of {HEADS.n_kv_heads} KV heads of {HEADS.head_size} elements" in SECTION
    assert f"{N_REQUESTS} requests of {N_TOKENS:,} tokens" in SECTION
