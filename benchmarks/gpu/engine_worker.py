"""One engine on a GPU, in the process that it is made in: how it starts, reads a prompt, and decodes."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.cache_layout import layout_in_use
from vllm_sparq.benchmarks.common.proof import engine_report
from vllm_sparq.benchmarks.engine.cases import Case
from vllm_sparq.benchmarks.engine.worker import TurnsWorker

FIGURES = {
    "Model loading took": "load",
    "Available KV cache memory": "kv_cache",
    "Graph capturing finished": "capture",
    "torch.compile took": "compile",
    "init engine (profile": "init",
}
"""How a line of vLLM's begins -> what it is about."""

STEPS_TO_WARM_UP = 16


class StartLog(logging.Handler):
    """What vLLM says of its start."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        """What a line is about -> seconds and GiB that it names."""
        found: dict[str, dict[str, float]] = {}
        for line in self.lines:
            for text, about in FIGURES.items():
                if text in line:
                    rest = line.split(text)[1]
                    seconds, memory = (re.search(rf"([\d.]+) {unit}", rest) for unit in ("s", "GiB"))
                    named = {"s": seconds, "gib": memory}
                    found[about] = {name: float(match.group(1)) for name, match in named.items() if match}
        return found


class GpuEngineWorker(TurnsWorker):
    """Prepares batches and decodes as `TurnsWorker` does, with what a server would start with: graphs, profiled memory.

    Every request has a prompt of its own, which is read as it should be: requests that shared pages would share the L2.

    Args:
        arguments: of vLLM's, for the method.
        folder: with config.json; the weights are drawn at random.
        graphs: or ``--enforce-eager``.
        max_model_len: tokens of the longest request.
        more: further arguments of vLLM's.
    """

    def __init__(  # of a start of its own: nothing of an engine with graphs can be replaced after it
        self, arguments: dict[str, Any], folder: Path, *, graphs: bool, max_model_len: int, more: dict[str, Any]
    ) -> None:
        import torch
        from vllm import LLM, SamplingParams

        said, begin = StartLog(), time.monotonic()
        logging.getLogger("vllm").addHandler(said)
        llm = LLM(
            str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=not graphs,
            max_model_len=max_model_len,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **arguments,
            **more,
        )
        self.start_s = round(time.monotonic() - begin, 1)
        logging.getLogger("vllm").removeHandler(said)
        self.start_figures = said.figures
        self.engine = llm.llm_engine
        client: Any = self.engine.engine_core
        self.core = client.engine_core  # it runs in this process
        self.report = engine_report(self.engine.vllm_config)
        self.text = None
        generator = torch.Generator().manual_seed(0)
        self.vocabulary = torch.randint(10, 250, (max_model_len,), generator=generator).tolist()
        self.params = SamplingParams(temperature=0, max_tokens=max_model_len, ignore_eos=True, detokenize=False)
        self.n_prepared = 0

    def describe(self) -> dict[str, Any]:
        """The classes that run, what starting took, and how the cache is cut."""
        import torch

        config = self.engine.vllm_config
        used = {}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            used = {"used_gib": round((total - free) / 2**30, 2)}
        return {
            "report": self.report,
            "kv_capacity_tokens": int(config.cache_config.kv_cache_size_tokens),
            "start_s": self.start_s,
            "start_figures": self.start_figures,
            "graph_mode": str(config.compilation_config.cudagraph_mode),
            **used,
            **layout_in_use(self.engine).fields,
        }

    def prefill_s(self, context: int) -> float:
        """Seconds to the first token of a prompt of so many tokens, alone."""
        self._abort()
        self.n_prepared += 1
        params = self.params.clone()
        self.engine.add_request(f"p{self.n_prepared}", {"prompt_token_ids": self._of_length(context)}, params)
        begin = time.perf_counter()
        while not any(self._n_tokens().values()):
            self.engine.step()
        spent = time.perf_counter() - begin
        self._abort()
        return round(spent, 3)

    def step_ms(self, n_steps: int) -> list[float]:
        """Times of the next steps, after a few that are not counted."""
        self.decode(STEPS_TO_WARM_UP)
        return [round(1e3 * seconds, 3) for seconds in self.decode(n_steps).seconds]

    def _abort(self) -> None:
        running = [request.request_id for request in self.engine.output_processor.request_states.values()]
        self.engine.abort_request(running, internal=True)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def _prompt(self, i: int, case: Case) -> list[int]:
        return self._of_length(case.context, 1 + i)

    def _of_length(self, n: int, i: int = 0) -> list[int]:
        """The i-th prompt of so many tokens: the same tokens from another place on."""
        shift = 97 * i % len(self.vocabulary)
        return (self.vocabulary[shift:] + self.vocabulary[:shift])[:n]
