"""Engines on the pretended CUDA; nothing here is collected without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import engine, prompts

__all__ = ["engine", "prompts"]

collect_ignore_glob = [] if "tests.cuda.plugin" in sys.modules else ["test_*.py"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of two query heads on one KV head, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=256,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
