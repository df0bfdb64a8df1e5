"""Which model a folder holds, wherever it lies: two checkpoints of one shape and one name are two cases."""

from __future__ import annotations

import hashlib
from pathlib import Path

N_EDGE_BYTES = 1 << 20
"""Bytes at either end of a weight file that stand for it: hashing tens of gigabytes takes longer than answering."""


def fingerprint(model: Path) -> str:
    """Of a model's configuration, tokenizer and weights, wherever its folder lies."""
    found = hashlib.sha256()
    for path in sorted(model.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".bin", ".model", ".txt"):
            continue
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            found.update(file.read(N_EDGE_BYTES))
            file.seek(max(0, size - N_EDGE_BYTES))
            found.update(file.read(N_EDGE_BYTES))
    return found.hexdigest()[:16]
