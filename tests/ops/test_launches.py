"""Launches and scratch of the Triton ops: what every layer of every decode step pays, whatever the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.ops.launches import BATCHES, MODEL_LENGTHS, call, table
from vllm_sparq.ops.triton_common.launch import SCRATCH_BYTES

TRACKED = dict(positions=True, attention=True)


@pytest.mark.parametrize("model_length", MODEL_LENGTHS[1:])
def test_a_large_batch_is_one_slice(model_length: int) -> None:
    """No more launches than one request, within the limit of scratch: at max_model_len 131072 too."""
    for batch in BATCHES[:-1]:
        found = call("sparq_decode", batch, model_length)
        assert found.kernels == ["score_kernel", "partition_kernel", "attend_kernel"]
        assert found.scratch <= SCRATCH_BYTES == 2 << 30


@pytest.mark.parametrize("batch", BATCHES)
def test_what_is_never_read_sparsely_is_read_densely(batch: int) -> None:
    """Where no context can be as long as those that a sparse read begins with, nothing is scored."""
    found = call("sparq_decode", batch, MODEL_LENGTHS[0])
    assert found.kernels == call("dense_decode", batch, MODEL_LENGTHS[0]).kernels


def test_more_than_fits_runs_in_slices() -> None:
    found = call("sparq_decode", 512, 131072)
    assert found.kernels == ["score_kernel", "partition_kernel", "attend_kernel"] * 2
    assert found.scratch <= 2 * SCRATCH_BYTES


@pytest.mark.parametrize(
    ("op", "options", "kernels"),
    [
        ("sparq_decode", dict(mean_value="on"), "score partition attend"),
        ("sparq_decode", dict(group_reduce="probs"), "score count partition attend"),
        ("sparq_decode", dict(mass=0.9), "score partition cut attend"),
        ("sparq_decode", dict(layout=TRACKED), "score partition attend attention"),
        ("quest_decode", {}, "rank partition attend"),
        ("dense_decode", {}, "attend merge"),
        ("dense_decode", dict(layout=dict(format="int4")), "attend merge"),
        ("dense_decode", dict(layout=TRACKED), "attend merge attention"),
        ("evict", dict(layout=TRACKED), "choose move"),
    ],
)
@pytest.mark.parametrize("batch", [1, 64])
def test_launches_of_a_layer(op: str, options: dict[str, Any], kernels: str, batch: int) -> None:
    names = [name.removesuffix("_kernel") for name in call(op, batch, 32768, **options).kernels]
    assert names == kernels.split()


def test_scratch_is_what_the_options_need() -> None:
    """Head scores, 4 bytes for each of four heads, are kept for the mean value and not for the default."""
    plain, mean = (call("sparq_decode", 64, 131072, **o).scratch for o in ({}, dict(mean_value="on")))
    n_tokens = 64 * 8 * 131072
    assert 4 * n_tokens < plain < 5.1 * n_tokens
    assert 16 * n_tokens < mean - plain < 16.2 * n_tokens


def test_scratch_of_an_eviction_follows_what_stays() -> None:
    """Of requests of 1,024 tokens at max_model_len 131072: two numbers for each, and one for each row."""
    found = call("evict", 256, 131072, layout=TRACKED, most_kept=1024)
    assert found.scratch == 4 * 256 * 8 * (2 * 1024 + 1)
    assert found.kernels == ["choose_kernel", "move_kernel"]


def test_the_page_on_gpus_shows_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "gpu.md"
    assert table() in page.read_text(encoding="utf-8")
