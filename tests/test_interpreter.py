"""Interpreted kernels give the same bytes whether or not `tests.interpreter` takes the idle work from them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import interpreter
from vllm_sparq.reads import SparqRead

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]


def digests() -> dict[str, str]:
    """SHA-256 of what the kernels leave in their buffers, by case: all of them, pages and poison included."""
    from tests.ops.cases import Case, build
    from vllm_sparq.ops.dense_decode.triton import dense_decode
    from vllm_sparq.ops.sparq_decode.triton import sparq_decode
    from vllm_sparq.ops.write.triton import write

    found = {}
    for case in (
        Case(lens=(1, 15, 16, 17, 33), new=(1, 3, 16, 1, 33)),
        Case(lens=(40, 33), new=(7, 1), format="int4", heads=2, kv_heads=1, dtype=torch.bfloat16),
    ):
        world = build(case, written="context")
        world.write(write)
        found[f"write {case}"] = digest(world.buffer)
    for case in (Case(lens=(1, 40, 0, 33)), Case(lens=(16, 0, 70), format="int4", dtype=torch.float16)):
        world = build(case)
        read = SparqRead(r=8, min_k=8, alpha_floor=0.0)
        found[f"dense_decode {case}"] = digest(world.decode(dense_decode), world.buffer)
        found[f"sparq_decode {case}"] = digest(world.decode(sparq_decode, read=read), world.buffer)
    return found


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_results_are_those_of_triton_as_it_is() -> None:
    """Beside a process in which Triton is left alone."""
    code = "import json; from tests.test_interpreter import digests; print(json.dumps(digests()))"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert digests() == json.loads(done.stdout)


def test_it_is_on_without_cuda_and_off_with_it() -> None:
    from triton.runtime.interpreter import GridExecutor

    is_ours = GridExecutor._init_args_hst.__module__ == interpreter.__name__
    assert is_ours == (not torch.cuda.is_available())


def test_tensors_of_a_device_are_copied() -> None:
    """Even if somebody switches it on where there is a GPU."""

    def copy_in(self: Any, args: Any, kwargs: Any) -> tuple[str, str]:
        return "copied", "copied"

    restored = []
    init = interpreter._in_place(copy_in)
    restore = interpreter._nothing_to_restore(lambda *given: restored.append(given))
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    for args, kwargs in (((here, 1, None), {}), ((here, (here, 2.0)), {"x": here})):
        assert init(None, args, kwargs) == (args, kwargs)
        restore(None, args, args, kwargs, kwargs)
    assert not restored
    descriptor = SimpleNamespace(base=here)
    for args, kwargs in (((there,), {}), ((here,), {"x": there}), ((1, (here, there)), {}), ((descriptor,), {})):
        assert init(None, args, kwargs) == ("copied", "copied")
        restore(None, args, "copied", kwargs, "copied")
    assert len(restored) == 4


def test_an_interpreter_that_has_changed_is_refused() -> None:
    from triton.runtime import interpreter as real

    def with_(**changes: Any) -> SimpleNamespace:
        return SimpleNamespace(**{**vars(real), **changes})

    interpreter.check(with_())
    with pytest.raises(interpreter.MovedError, match=r"_patch_lang takes \('fn', 'scope'\) instead of \('fn',\)"):
        interpreter.check(with_(_patch_lang=lambda fn, scope: None))
    with pytest.raises(interpreter.MovedError, match=r"there is no GridExecutor._init_args_hst in .*adapt"):
        interpreter.check(with_(GridExecutor=object))
    asserting = SimpleNamespace(options=SimpleNamespace(debug=True, sanitize_overflow=True))
    with pytest.raises(interpreter.MovedError, match="the interpreter asserts that no integer overflows"):
        interpreter.check(with_(interpreter_builder=asserting))
