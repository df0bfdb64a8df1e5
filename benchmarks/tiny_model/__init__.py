"""A small model that retrieves: its training from scratch, its weights, and its scores on the generated tasks."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"  # a Hugging Face model folder
