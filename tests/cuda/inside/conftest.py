"""Engines on the pretended CUDA; nothing here is collected without it."""

from __future__ import annotations

import sys

from tests.engine.conftest import engine, prompts

__all__ = ["engine", "prompts"]

collect_ignore_glob = [] if "tests.cuda.plugin" in sys.modules else ["test_*.py"]
