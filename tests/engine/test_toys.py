"""Adding a method is a file and a row: a toy of each axis is added to a copy of the sources, and a real engine runs it.

What a toy touches is counted: its own file, its row in the table of its axis, and for a read its op folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.support import MODEL, environment
from tests.test_imports import FOLDERS, ROOT

pytestmark = [pytest.mark.engine, pytest.mark.long]

READ = '''"""``read: newest``: the newest tokens alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from vllm_sparq.reads.base import HeadShape, SparseRead


@dataclass(frozen=True, kw_only=True)
class NewestRead(SparseRead):
    op: ClassVar[str] = "newest_decode"

    @classmethod
    def resolve(cls, options, heads: HeadShape) -> Self:
        return cls(**cls.shared(options, 1 / options.compression))

    def is_dense(self, context_len: int) -> bool:
        return context_len < self.dense_below or context_len <= self.k(context_len)

    def n_selected(self, context_len: int) -> int:
        return min(context_len, self.k(context_len))
'''

OP = '''"""Softmax attention over the newest ``read.k`` tokens."""

from vllm_sparq.ops.dense_decode.reference import attend, decode_rows


def newest_decode(query, pages, block_table, seq_lens, *, read, scale, out):
    for row in decode_rows(query, pages, block_table, seq_lens, out):
        n = row.context_len if read.is_dense(row.context_len) else read.n_selected(row.context_len)
        row.out[:] = attend(row.q, row.keys[-n:], row.values[-n:], scale)
'''

NEW_FILES = {
    "vllm_sparq/reads/newest.py": READ,
    "vllm_sparq/ops/newest_decode/__init__.py": '"""A toy."""\n',
    "vllm_sparq/ops/newest_decode/reference.py": OP,
}
"""What a read brings: its own file and its op folder. A format and a retention bring none."""

ROWS = {
    "vllm_sparq/reads/__init__.py": [
        ("from vllm_sparq.reads.dense import DenseRead\n", "from vllm_sparq.reads.newest import NewestRead\n"),
        ('"dense": DenseRead', ', "newest": NewestRead'),
    ],
    "vllm_sparq/formats.py": [('    "model": None,\n', '    "byte": _both(Coding(bits=8, group=32)),\n')],
    "vllm_sparq/retention.py": [
        ('    "all": None,\n', '    "anchors": Policy(rank="age", sinks=32, recent=1, summary="the newest"),\n')
    ],
}
"""Table of an axis -> (what stands there, the row that goes after it)."""

SCRIPT = """
import json, sys
import vllm_sparq
assert vllm_sparq.__file__.startswith(sys.argv[1]), vllm_sparq.__file__
from vllm import LLM, SamplingParams

def answers(options):
    llm = LLM(sys.argv[2], attention_backend="sparq", additional_config={"sparq": options}, dtype="float32",
              enforce_eager=True, max_model_len=512, block_size=32, kv_cache_memory_bytes=32 << 20, seed=0,
              disable_log_stats=True)
    layer = next(iter(llm.collective_rpc("attention_report")[0].values()))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [3 + i * 7 % 200 for i in range(n)]} for n in (50, 90)]
    found = [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    return {"answers": found, "layer": layer}

dense = {"read": "dense"}
newest = {"read": "newest", "dense_below": 0}
print("FOUND " + json.dumps({
    "dense": answers(dense),
    "newest, all of them": answers({**newest, "k": 512}),
    "newest": answers({**newest, "k": 8}),
    "byte": answers({**dense, "format": "byte"}),
    "anchors, all of them": answers({**dense, "retention": "anchors", "budget": 512}),
    "anchors": answers({**dense, "retention": "anchors", "budget": 48}),
    "all three": answers({**newest, "k": 24, "format": "byte", "retention": "anchors", "budget": 96}),
}))
"""


def tree_with_toys(folder: Path) -> Path:
    """The package as it installs, of links to the sources, with the toys' files and rows."""
    package = folder / "vllm_sparq"
    for source, name in FOLDERS.items():
        inside = package / name.replace(".", "/").removeprefix("vllm_sparq").strip("/")
        for path in (ROOT / source).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = inside / path.relative_to(ROOT / source)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path)
    for name, text in NEW_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, rows in ROWS.items():
        text = (folder / name).read_text()
        (folder / name).unlink()
        for before, row in rows:
            assert text.count(before) == 1, f"{name}: {before!r} does not stand there once"
            text = text.replace(before, before + row)
        (folder / name).write_text(text)
    return folder


def test_a_toy_of_each_axis_runs_in_a_real_engine(tmp_path: Path) -> None:
    environment()
    tree = tree_with_toys(tmp_path)
    settings = {**os.environ, "PYTHONPATH": str(tree), "VLLM_SPARQ_IMPL": "reference"}
    command = [sys.executable, "-c", SCRIPT, str(tree), str(MODEL)]
    done = subprocess.run(command, env=settings, cwd=tree, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))[6:])
    answers = {name: run["answers"] for name, run in found.items()}
    assert answers["newest, all of them"] == answers["anchors, all of them"] == answers["dense"]
    for name in ("newest", "anchors", "all three"):
        assert answers[name] != answers["dense"], name
    layer = found["all three"]["layer"]
    assert layer["ops"]["newest_decode"] == "reference (forced by VLLM_SPARQ_IMPL)"
    assert {layer["options"][axis] for axis in ("read", "format", "retention")} == {"newest", "byte", "anchors"}
