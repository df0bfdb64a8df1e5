"""Engine core and workers in processes of their own: the plugin arrives there, and the class in use is ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import preloaded
from tests.engine.support import EXACT, MODEL, NGRAM, Prompts

pytestmark = pytest.mark.engine

SCRIPT = """
import json, sys

def main(settings):
    from vllm import LLM, SamplingParams
    llm = LLM(**settings["engine"])
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in settings["prompts"]], params, use_tqdm=False)
    reports = llm.collective_rpc("attention_report")
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    print("RESULT" + json.dumps({"tokens": tokens, "reports": reports, "metrics": metrics}))

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
"""


def settings_of(prompts: list[list[int]], **engine_args: object) -> str:
    """What the script is given."""
    settings = {
        "engine": {
            "model": str(MODEL),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "kv_cache_memory_bytes": 64 << 20,
            "disable_log_stats": False,
            "attention_backend": "sparq",
            "additional_config": {"sparq": EXACT["sparse"]},
            **engine_args,
        },
        "prompts": prompts,
    }
    return json.dumps(settings)


def run_engine(prompts: list[list[int]], env: dict[str, str] | None = None, **engine_args: object) -> dict:
    """Tokens, attention reports and metrics of an engine in a fresh process, which spawns its core and workers."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, settings_of(prompts, **engine_args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


def run_in_one_process(folder: Path, prompts: list[list[int]], **engine_args: object) -> dict:
    """The same of an engine in one process, which has loaded vLLM but nothing that drafts."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    words = [str(script), settings_of(prompts, **engine_args)]
    said = preloaded.run(words, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, folder / "said")
    return json.loads(said.split("RESULT")[1])


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2], ids=["spawn", "tensor parallel 2"])
def test_class_in_the_worker(workers: int, prompts: Prompts, sparse_alone: dict[int, list[int]]) -> None:
    chosen = [0, 4, 6, 9]
    result = run_engine([prompts.mixed[i] for i in chosen], tensor_parallel_size=workers)
    assert len(result["reports"]) == workers
    for report in result["reports"]:
        assert len(report) == 4
        assert {(layer["backend"], layer["impl"]) for layer in report.values()} == {("SPARQ", "PagedImpl")}
    assert result["tokens"] == [sparse_alone[i] for i in chosen]


def test_speculative_decoding(tmp_path: Path, prompts: Prompts, sparse_alone: dict[int, list[int]]) -> None:
    """Draft tokens are verified with the reads that decoding them one by one would have made."""
    result = run_in_one_process(tmp_path, prompts.mixed, speculative_config=NGRAM)
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert result["tokens"] == list(sparse_alone.values())


@pytest.mark.parametrize(
    "fmt", ["kivi4", pytest.param("int4", marks=pytest.mark.long), pytest.param("kivi2", marks=pytest.mark.long)]
)
def test_speculative_decoding_over_codes(fmt: str, tmp_path: Path, prompts: Prompts, engine: Any) -> None:
    """vLLM's own drafts, of which many are right in these prompts; the rest is in `tests.engine.test_drafts`."""
    options = {"format": fmt, "read": "dense"}
    batch = [prompt for prompt in prompts.mixed if len(prompt) < 1000]
    with engine("sparq", options, block_size=32) as llm:
        plain = prompts.answers(llm, batch)
    config = {"additional_config": {"sparq": options}, "block_size": 32, "speculative_config": NGRAM}
    result = run_in_one_process(tmp_path, batch, **config)
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert result["tokens"] == plain


def test_never_silently_dense(prompts: Prompts) -> None:
    """Where vLLM does not take our platform, a start under our name fails instead of running dense attention.

    So it does with plugins switched off, as doctor's own engine shows in `tests.test_doctor`.
    """
    with pytest.raises(AssertionError, match="VLLM_TARGET_DEVICE"):
        run_engine([prompts.mixed[0]], env={"VLLM_TARGET_DEVICE": "cpu"})
