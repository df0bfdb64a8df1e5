"""A model with channels of K that 4 bits per token cannot hold: the engine says so before anybody reads an answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.support import MODEL, Prompts
from vllm_sparq.attention_backends import impl


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with one rotated pair of K thirty times as large, of the query as small: no logit changes."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("planted")
    for file in MODEL.iterdir():
        shutil.copy(file, folder / file.name)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        factor = {"q_proj": 1 / 30, "k_proj": 30.0}.get(name.split(".")[-2])
        if factor is not None:
            by_head = weight.view(-1, 64, weight.shape[1])
            by_head[:, [10, 42]] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What layers say in the log."""
    said: list[str] = []
    monkeypatch.setattr(impl, "logger", SimpleNamespace(warning_once=said.append, info_once=said.append))
    return said


def test_no_logit_changes(planted: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = torch.tensor([list(range(3, 200))])
    models = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (planted, MODEL))
    with torch.inference_mode():
        found, wanted = (model(prompt).logits for model in models)
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=0)


@pytest.mark.engine
def test_an_engine_says_so_at_its_first_prompt(planted: Path, engine: Callable[..., Any], warned: list[str]) -> None:
    """In every layer that has such channels, with the formats to use instead; not where K fits."""
    prompt = [list(range(3, 200))]
    for model, backend, options, is_told in (
        (MODEL, "flexgen", {}, False),
        (planted, "flexgen", {}, True),
        (planted, "kivi", {}, False),
        (planted, "flexgen", {"format": "k8v4"}, False),
    ):
        with engine(backend, options, model=str(model)) as llm:
            for _ in range(2):
                Prompts.answers(llm, prompt, n_tokens=4)
        assert any("'int4' stores the channels" in line and '"k8v4"' in line for line in warned) == is_told
        assert len(warned) <= 4  # once a layer
        warned.clear()
