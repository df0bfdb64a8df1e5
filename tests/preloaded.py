"""Scripts in processes that need not load vLLM, which takes eight seconds of CPU: forked from one that has.

A process of a fork server inherits nothing from this one, just as a spawned one: what it is given is pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

from tests.engine.support import environment

PRELOADED = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
]

SETTLED = {
    "TQDM_DISABLE": "",
    "TORCH_COMPILE_DISABLE": "1",
}
"""Variables that are read when their modules are loaded, so for all these processes.

vLLM's own commands divide by what progress bars count. vLLM compiles how it counts the ranks of log-probabilities, in
each process anew: four seconds, twelve at first.
"""


def context() -> ForkServerContext:
    """Starts such processes as `multiprocessing` does."""
    environment()
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, SETTLED):
        forkserver.ensure_running()
    return forking


def run(words: Sequence[str], variables: Mapping[str, str], said: Path, timeout_s: float = 400) -> str:
    """What a script prints; its path and arguments are ``words``.

    Raises:
        AssertionError: it failed; with the end of what it printed, which is in ``said`` and ``said.err``.
    """
    files = said, said.with_suffix(".err")
    process = context().Process(target=_script, args=(words, {**os.environ, **variables}, files))
    process.start()
    process.join(timeout_s)
    failed = process.exitcode != 0
    process.kill()
    assert not failed, files[1].read_text()[-3000:]
    return files[0].read_text()


def _script(words: Sequence[str], variables: Mapping[str, str], files: Sequence[Path]) -> None:
    for descriptor, path in enumerate(files, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")
