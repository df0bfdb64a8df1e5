"""Engines on the pretended CUDA; nothing here is collected without it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.engine.conftest import engine, prompts, tokenizer
from tests.engine.small_models import llama

__all__ = ["engine", "prompts", "tokenizer"]

collect_ignore_glob = [] if "tests.cuda.plugin" in sys.modules else ["test_*.py"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of two query heads on one KV head, with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    return llama(folder, seed=5, vocab_size=256, max_position_embeddings=4096, initializer_range=0.2)
