"""Kernels are compiled without a GPU, each once, into the cache where the launcher looks for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

INSIDE = """
import json
from dataclasses import replace
from triton import knobs
from vllm_sparq.benchmarks.gpu import cells, compiling
from vllm_sparq.benchmarks.gpu.cells import Cell, named

hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
compiling.set_up(compiling.Target(capability=90, multiprocessors=132))
small, large = (cells.decode("model+mean", *at) for at in ((1, 4096), (16, 32768)))
keys = [compiling.keys_of(cell) for cell in (small, large)]
check = replace(named("int4"), lens=(5, 200), tracked=True)
checked = compiling.keys_of(Cell(name="check/x", kind="check", seconds=1.0, case=check))
index = [name for name, _ in keys[0]].index("open_sums_kernel")
one = compiling.compile_launch(small, index)
from vllm_sparq.ops.write.triton_sums import open_sums_kernel
open_sums_kernel.device_caches.clear()
two = compiling.compile_launch(small, index)
print(json.dumps({"keys": keys, "checked": checked, "one": one, "two": two, "hits": hits}))
"""


@pytest.mark.slow
def test_launches_are_compiled_for_a_device_that_is_not_here(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", INSIDE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    names = [[name for name, _ in keys] for keys in found["keys"]]
    assert {"score_kernel", "partition_kernel", "attend_kernel", "write_kernel"} <= set(names[0])
    splits = [dict(map(tuple, keys))["score_kernel"] for keys in found["keys"]]
    assert splits[0] != splits[1]  # rows of one request are shared by more programs
    assert {"encode_kernel", "prefill_kernel", "move_kernel"} <= {name for name, _ in found["checked"]}
    assert found["one"]["kernel"] == found["two"]["kernel"] == "open_sums_kernel"
    assert found["hits"] == [False, True]
    assert found["one"]["shared_bytes"] >= 0
