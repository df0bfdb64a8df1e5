"""The folder of an evaluation: what decides an answer, and which models are one."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_sparq.benchmarks.common import records
from vllm_sparq.benchmarks.common.fingerprint import fingerprint
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality.engine import Run
from vllm_sparq.benchmarks.quality.prompts import Wanted
from vllm_sparq.benchmarks.quality.store import Store
from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import UsageError

RUN = Run(model=WEIGHTS)
DENSE, SPARQ = Method.named("dense"), Method.named("sparq")


def needle(seed: int = 0) -> Example:
    (found,) = Wanted(model=WEIGHTS, tasks=["needle"], lengths=[400], n=1, seed=seed).examples(4096)
    return found


def test_what_decides_an_answer_is_in_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, other_seed = needle(), needle(seed=1)
    store = Store(tmp_path, RUN)
    keys = [
        store.key(DENSE, example),
        store.key(SPARQ, example),
        store.key(Method.named("sparq", {"k": 64}), example),
        store.key(DENSE, other_seed),
        Store(tmp_path, Run(model=WEIGHTS, dtype="float32")).key(DENSE, example),
        Store(tmp_path, Run(model=WEIGHTS, engine_args={"max_model_len": 512})).key(DENSE, example),
    ]
    code, device = records.code(), records.device()
    for change in (
        {"commit": "another"},
        {"dirty": True, "changes": "1"},
        {"dirty": True, "changes": "2"},
        {"cpu": "another"},
        {"gpu": "H100"},
    ):
        monkeypatch.setattr(records, "code", lambda change=change: code | change)
        monkeypatch.setattr(records, "device", lambda change=change: device | change)
        keys.append(Store(tmp_path, RUN).key(DENSE, example))
    assert len(set(keys)) == len(keys)


def test_a_fingerprint_is_of_the_weights_and_not_of_the_folder(tmp_path: Path) -> None:
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"key": "a"}\nbroken\n{"key": "b"}\n')
    with pytest.raises(UsageError, match=r"examples.jsonl:2 is not a JSON object"):
        records.read_records(path)
