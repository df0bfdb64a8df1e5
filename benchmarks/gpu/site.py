"""The plugin of a checkout that is not installed, as vLLM finds plugins: a folder for PYTHONPATH.

vLLM looks plugins up by the entry points of installed packages, and `pip install .` wants a compiler and an index,
which a machine that is rented for half an hour may not have.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

MAPPED = ("attention_backends", "scheduler", "benchmarks")
"""Folders of the checkout that install inside of the package."""


def make_site(root: Path, site: Path) -> Path:
    """Fill a folder with links into the checkout at ``root`` and with what says that it is installed."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = site / "vllm_sparq"
    package.mkdir(parents=True)
    for path in [*(root / "vllm_sparq").iterdir(), *(root / name for name in MAPPED)]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    said = site / f"{project['name'].replace('-', '_')}-0+checkout.dist-info"
    said.mkdir()
    (said / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0+checkout\n")
    groups = {**project["entry-points"], "console_scripts": project["scripts"]}
    lines = [
        line for group, names in groups.items() for line in (f"[{group}]", *(f"{n} = {v}" for n, v in names.items()))
    ]
    (said / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site
