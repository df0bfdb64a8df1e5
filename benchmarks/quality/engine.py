"""One engine in a process of its own, which answers, measures and decodes when it is told to."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_sparq.attention_backends.engine import on_platform, rebind_refusal
from vllm_sparq.benchmarks.common.engine_process import IN_TURNS, EngineProcess
from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.quality.divergence import distribution_file, read_divergence
from vllm_sparq.benchmarks.quality.shortening import Shortened
from vllm_sparq.benchmarks.tasks.generated import Example


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is the same for all engines of an evaluation.

    Attributes:
        model: a model folder.
        dtype: element type of the model, as vLLM names it.
        engine_args: more keyword arguments of `vllm.LLM`.
        stepwise: force step by step even where a prompt would measure the method: checks one way against the other.
    """

    model: Path
    dtype: str = "bfloat16"
    engine_args: dict[str, Any] = field(default_factory=dict)
    stepwise: bool = False

    def llm_args(self, method: Method) -> dict[str, Any]:
        """Keyword arguments of `vllm.LLM`, without prefix caching: no answer may depend on those before it."""
        ours = dict(
            dtype=self.dtype,
            enforce_eager=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            kv_cache_memory_bytes=1 << 30,
            disable_log_stats=True,
        )
        return {**ours, **self.engine_args, **method.engine_args}


@dataclass(frozen=True, kw_only=True)
class Output:
    """What an engine said, or (``nats``) how unlikely it found what it was made to say.

    Attributes:
        text: the output.
        n_tokens: its tokens.
        nats: negative log-likelihood of forced tokens; None where the output was generated.
        divergence: of each forced token's distribution from dense's, in nats (`divergence`); None where that was not
            asked for, and for dense.
        n_changed: forced tokens before which another token was the likeliest than dense's.
    """

    text: str
    n_tokens: int
    nats: float | None = None
    divergence: tuple[float, ...] | None = None
    n_changed: int | None = None


def same_cache(a: Method, b: Method) -> bool:
    """Whether one engine can be both methods, one after the other, on every model: over the same pages."""
    if a.backend is None or b.backend is None:
        return a.backend == b.backend
    one, other = a.parsed, b.parsed
    return a.backend == b.backend and all(
        rebind_refusal(one, other, grouped=grouped) is None for grouped in (True, False)
    )


class Engine(EngineProcess):
    """An engine in a process of its own; `start` proves which attention classes run and with which options."""

    def __init__(self, method: Method, run: Run) -> None:
        super().__init__(f"the {method.name} engine", Worker, method, run, environment=IN_TURNS)
        self.method, self.run = method, run
        self.classes: list[str] = []
        self.max_model_len = 0

    def start(self, within: float | None = None) -> None:
        """Start the process.

        Raises:
            UsageError: the engine did not start, or what runs in it is not what was asked for.
        """
        super().start(within)
        found = self.ask("describe")
        self.classes, self.max_model_len = found["classes"], found["max_model_len"]

    def answer(self, examples: Sequence[Example], distributions: Path | None = None) -> list[Output]:
        """All examples in one batch: generated answers, and forced ones measured.

        With a folder of ``distributions`` answers are forced step by step; dense leaves its distributions there, and
        every other method is compared with them.
        """
        return list(self.ask("answer", list(examples), distributions))

    def use(self, method: Method) -> None:
        """Read as another method of the same cache does (`same_cache`), from here on."""
        if method == self.method:
            return
        if not same_cache(method, self.method):
            raise ValueError(f"{method.name} needs an engine of its own")
        self.ask("read", method)
        self.method = method

    def prepare(self, context: int, batch: int) -> None:
        """``batch`` requests with ``context`` random tokens each, ready to decode."""
        self.ask("prepare", context, batch)

    def decode(self, n_steps: int) -> list[float]:
        """Seconds of each of the next steps of what was prepared."""
        return list(self.ask("decode", n_steps))

    def cached(self) -> tuple[float, float]:
        """Prompt tokens looked for in the prefix cache, and found there, since the start (with vLLM's log of stats)."""
        queries, hits = self.ask("cached")
        return queries, hits


class Worker:
    """Child's side: the engine, in the process that it is made in. Its public methods are the orders it takes."""

    def __init__(self, method: Method, run: Run) -> None:
        from vllm import LLM

        from vllm_sparq.benchmarks.quality.forced import ForcedTokens, prompts_measure

        self.method = method
        self.batch = 0
        self.prompts_measure = prompts_measure(method) and not run.stepwise
        self.llm = LLM(str(run.model), logits_processors=[ForcedTokens], **run.llm_args(method))
        self.engine: Any = self.llm.llm_engine
        layers: Any = self.engine.vllm_config.compilation_config.static_forward_context.values()
        self.impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
        self._check()

    def _ours(self) -> list[Any]:
        return [impl for impl in self.impls if type(impl).__module__.startswith("vllm_sparq.")]

    def _check(self) -> None:
        """What runs must be what was asked for: vLLM may pass over a backend that it is told to use."""
        ours, backend = self._ours(), self.method.backend
        names = sorted({type(impl).__name__ for impl in self.impls})
        if backend is None and ours:
            raise RuntimeError(f"dense attention was asked for and {names} run")
        if backend is not None:
            wanted = on_platform(self.method.parsed)
            if not ours or any(impl.options != wanted for impl in ours):
                raise RuntimeError(f"{backend} with {wanted} was asked for and {names} run")

    def describe(self) -> dict[str, Any]:
        classes = sorted({type(impl).__name__ for impl in self.impls})
        return {"classes": classes, "max_model_len": self.engine.vllm_config.model_config.max_model_len}

    def read(self, method: Method) -> None:
        """Bind every layer of ours anew, with other options of its read; where none is, prompts alone change."""
        for impl in self._ours():
            impl.rebind(method.parsed)
        self.method = method

    def answer(self, examples: list[Example], distributions: Path | None = None) -> list[Output]:
        self._abort()
        self.from_prompts = self.prompts_measure and distributions is None
        with tempfile.TemporaryDirectory(prefix="vllm-sparq-divergence-") as scratch:
            files = self._recordings(examples, distributions, Path(scratch))
            params = [self._params(example, asked) for example, asked in zip(examples, files, strict=True)]
            prompts = [self._prompt(example) for example in examples]
            found = self.llm.generate(prompts, params, use_tqdm=False)
            return [self._output(*one) for one in zip(examples, found, files, strict=True)]

    def _recordings(
        self, examples: Sequence[Example], distributions: Path | None, scratch: Path
    ) -> list[dict[str, str] | None]:
        """What is kept of the distributions of each answer: dense's in their folder, else what is compared."""
        if distributions is None:
            return [None] * len(examples)
        found: list[dict[str, str] | None] = []
        for i, example in enumerate(examples):
            kept = str(distributions / distribution_file(example))
            if not example.answer_ids:
                found.append(None)
            elif self.method.name == DENSE:
                found.append({"to": kept})
            else:
                found.append({"to": str(scratch / f"{i}.npz"), "dense": kept})
        return found

    def _prompt(self, example: Example) -> Any:
        ids = list(example.prompt_ids)
        if isinstance(self.method, Shortened):
            ids = self.method.shortened(ids or self.llm.get_tokenizer().encode(example.prompt))
        if example.answer_ids and self.from_prompts:
            return {"prompt_token_ids": [*ids, *example.answer_ids]}
        return {"prompt_token_ids": ids} if ids else example.prompt

    def _params(self, example: Example, asked: dict[str, str] | None) -> Any:
        from vllm import SamplingParams

        from vllm_sparq.benchmarks.quality.forced import FORCED, RECORDED

        if not example.answer_ids:
            return SamplingParams(temperature=0, max_tokens=example.max_tokens, stop=list(example.stop))
        if self.from_prompts:
            return SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        forced = list(example.answer_ids)
        return SamplingParams(
            temperature=0,
            max_tokens=len(forced),
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            extra_args={FORCED: forced} | ({} if asked is None else {RECORDED: asked}),
        )

    def _output(self, example: Example, output: Any, asked: dict[str, str] | None) -> Output:
        one, wanted = output.outputs[0], list(example.answer_ids)
        if not wanted:
            return Output(text=one.text, n_tokens=len(one.token_ids))
        if self.from_prompts:
            steps = output.prompt_logprobs[-len(wanted) :]
        else:
            steps = one.logprobs
            if list(one.token_ids) != wanted:
                raise RuntimeError("the engine did not say the tokens it was made to say")
        nats = -sum(step[token].logprob for step, token in zip(steps, wanted, strict=True))
        if asked is None or "dense" not in asked:
            return Output(text="", n_tokens=len(wanted), nats=nats)
        divergence, n_changed = read_divergence(Path(asked["to"]))
        return Output(text="", n_tokens=len(wanted), nats=nats, divergence=divergence, n_changed=n_changed)

    def prepare(self, context: int, batch: int) -> None:
        """Fill the cache with prompts and decode one token of each."""
        import torch
        from vllm import SamplingParams

        self.batch = batch
        self._abort()
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
        limit = self.engine.vllm_config.model_config.max_model_len
        params = SamplingParams(temperature=0, max_tokens=limit - context, ignore_eos=True, detokenize=False)
        for i in range(batch):
            prompt = torch.randint(vocabulary // 2, (context,), generator=generator).tolist()
            self.engine.add_request(f"{context}-{batch}-{i}", {"prompt_token_ids": prompt}, params)
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}

    def _abort(self) -> None:
        """End what was prepared, so that the engine is free."""
        states = self.engine.output_processor.request_states.values()
        self.engine.abort_request([state.request_id for state in states], internal=True)

    def cached(self) -> tuple[float, float]:
        """Prompt tokens looked for in the prefix cache, and found there."""
        values = {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}
        return values["vllm:prefix_cache_queries"], values["vllm:prefix_cache_hits"]

    def decode(self, n_steps: int) -> list[float]:
        times = []
        for _ in range(n_steps):
            begin = time.perf_counter()
            n_done = len(self.engine.step())
            if n_done != self.batch:
                raise RuntimeError(f"{n_done} of {self.batch} requests decoded in a step that should be timed")
            times.append(time.perf_counter() - begin)
        return times
