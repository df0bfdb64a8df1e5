"""A dozen of the tiny models; `make models` runs all of them on all methods."""

from __future__ import annotations

from typing import Any

import pytest

from tests.architectures import matrix, seeded
from tests.architectures.configurations import CLASSIC, MODELS, REFUSED, STATES
from tests.architectures.page import FORMATS, PAGE, gain_of, of_format, rows, text
from tests.architectures.real import REAL

CHOSEN = ("llama", "qwen3-moe", "phi-3", "glm-4", "gemma-3", "cohere-2", "gpt-neox", "opt")
WITH_STATES = ("qwen3-next", "granite-4", "nemotron-h", "zamba-2")


@pytest.mark.engine
@pytest.mark.parametrize("name", CHOSEN + WITH_STATES)
def test_with_nothing_left_out_it_is_stock(name: str) -> None:
    seeded.register()
    row = matrix.run(name, (matrix.ALL_READ,))
    assert not row.faults
    assert "SPARQ" in row.backends


def test_weights_follow_from_names() -> None:
    import torch

    one, other = (seeded.values("model.layers.0.mlp.up_proj.weight", torch.empty(3, 4)) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, seeded.values("model.layers.1.mlp.up_proj.weight", torch.empty(3, 4)))
    assert bool((seeded.values("layers.0.mixer.A", torch.empty(8)) < 0).all())


def test_the_page_has_every_model() -> None:
    assert len(CLASSIC) + len(STATES) >= 40
    served, refused = PAGE.read_text(encoding="utf-8").split("## What is refused")
    missing = [name for name in MODELS if f"\n| {name} | " not in (refused if name in REFUSED else served)]
    assert not missing, "run make models"


def test_the_page_is_read_as_it_is_written() -> None:
    """So that models may run one by one."""
    found = rows()
    assert PAGE.read_text(encoding="utf-8").startswith(text([found[name] for name in MODELS]))


@pytest.mark.engine
@pytest.mark.parametrize("name", REAL)
def test_beside_states_nine_tenths_of_a_gain_are_left(name: str) -> None:
    """At the size of real models, by vLLM's count; and the page says what is counted."""
    if name.startswith("Qwen3.5"):
        pytest.importorskip("torchvision", reason="vLLM imports torchvision for Qwen3.5, and the lock leaves it out")
    for label in FORMATS:
        assert f"\n{of_format(name, label)}\n" in PAGE.read_text(encoding="utf-8"), "run make models"
        if label == "dense":
            continue
        found, gain, kept = gain_of(name, label)
        assert found.page_tokens == (256 if label == "sparq" else 128)
        assert found.block_size % found.page_tokens == 0
        assert kept >= 0.9
        assert gain > {"sparq": 0.85, "int8": 1.8, "int4": 3.4, "kivi4": 3.1, "kivi2": 5.0}[label]


def test_a_model_that_answers_otherwise_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge of the matrix itself, with answers of nobody."""

    def answers(one: Any, folder: Any, backend: str, options: Any, **more: Any) -> Any:
        return [[i, i, int(backend == "sparq" and i == 3)] for i in range(8)], {"SPARQ": 4}

    monkeypatch.setattr(matrix, "answers", answers)
    assert matrix.run("llama", (matrix.ALL_READ,)).faults == [
        "7 of 8 answers are stock's; of its own in other chunks 8 are"
    ]
    assert matrix.run("bloom").faults == ["not refused"]
