"""A real engine of vLLM, as small as can be, with SparQ: what runs inside its worker? Used by `vllm-sparq doctor`.

`python -m vllm_sparq.doctor.engine FOLDER` does the work in a process of its own, which spawns the engine core, which
spawns the worker; it leaves its findings in report.json. `check_engine` runs that and reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_sparq import processes
from vllm_sparq.doctor.findings import Section

TIMEOUT_S = 240.0
PROMPT_LENGTH, N_TOKENS = 300, 8  # two full blocks of 128 and an open one; enough to read sparsely

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
"""A model of two layers whose weights vLLM makes up."""

OPTIONS = {"dense_below": 0, "k": 64}

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "OMP_NUM_THREADS": "1",
}
CLEARED = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_PORT")


class EngineError(RuntimeError):
    """The engine did not work; the message holds what its log says."""


def check_engine(folder: Path) -> dict[str, Any]:
    """Run the engine and report on it.

    Args:
        folder: empty; receives the model's configuration and the log.

    Returns:
        ``layers``: the worker's attention report; ``n_tokens``: how many tokens were generated; ``seconds``.

    Raises:
        EngineError: it did not start, did not answer, or took too long.
    """
    (folder / "config.json").write_text(json.dumps(CONFIG))
    log = folder / "engine.log"
    environment = {name: value for name, value in os.environ.items() if name not in CLEARED} | ENVIRONMENT
    command = [sys.executable, "-m", "vllm_sparq.doctor.engine", str(folder)]
    started = time.monotonic()
    process = processes.start_group(command, log=log, folder=folder, environment=environment)
    try:
        while process.poll() is None and time.monotonic() - started < TIMEOUT_S:
            time.sleep(0.1)
    finally:
        took_too_long = process.poll() is None
        processes.stop_group(process)
    report = folder / "report.json"
    if not report.is_file():
        reason = f"did not finish in {TIMEOUT_S:.0f} s" if took_too_long else "failed"
        raise EngineError("\n".join([f"the engine {reason}; its log says:", *processes.relevant_lines(log)]))
    return {**json.loads(report.read_text()), "seconds": round(time.monotonic() - started, 1)}


def engine_section() -> Section:
    """starting a small engine (half a minute)"""
    section = Section("engine")
    folder = Path(tempfile.mkdtemp(prefix="vllm-sparq-doctor-"))
    try:
        report = check_engine(folder)
    except EngineError as error:
        section.bad(str(error))
        return section
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    section.numbers = report
    layers = report["layers"].values()
    classes = sorted({f"{layer['impl']} (backend {layer['backend']})" for layer in layers})
    if layers and all(layer["backend"] == "SPARQ" for layer in layers):
        section.good(f"spawned engine core and worker; the worker's {len(layers)} layers run {', '.join(classes)}")
    else:
        section.bad(f"asked for SparQ, but the worker runs {', '.join(classes) or 'no attention layer'}")
    section.good(
        f"it generated {report['n_tokens']} tokens; {report['seconds']:.0f} s in all, nearly all of it imports"
    )
    return section


def run_engine(folder: Path) -> dict[str, Any]:
    """Start the engine in ``folder``, ask its worker, generate a few tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        attention_backend="sparq",
        additional_config={"sparq": OPTIONS},
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_num_seqs=1,
        kv_cache_memory_bytes=16 * 2**20,
        gpu_memory_utilization=0.2,
        disable_log_stats=True,
    )
    layers = llm.collective_rpc("attention_report")[0]
    prompt: Any = {"prompt_token_ids": [i % 250 for i in range(PROMPT_LENGTH)]}
    sampling = SamplingParams(temperature=0, max_tokens=N_TOKENS, ignore_eos=True, detokenize=False)
    output = llm.generate([prompt], sampling, use_tqdm=False)[0]
    return {"layers": layers, "n_tokens": len(output.outputs[0].token_ids)}


def _stop_everything(number: int, frame: object) -> None:
    """We lead a process group of our own: end the engine core and the worker with us."""
    signal.signal(number, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    time.sleep(5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop_everything)
    target = Path(sys.argv[1])
    target.joinpath("report.json").write_text(json.dumps(run_engine(target)))
