"""One of the engines that decode in turns, in the process that it is made in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.cache_layout import layout_in_use
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.common.proof import engine_report
from vllm_sparq.benchmarks.engine.cases import N_ANSWER, N_BATCHED, N_TAIL, Case, Engine
from vllm_sparq.benchmarks.engine.drafts import ForcedAcceptance, Turn


class SkippedAttention:
    """Replaces `forward` of an attention implementation: writes K and V, and attends only where asked to.

    Args:
        impl: the implementation.
        decode: whether steps of decodes attend.
        most_rows: tokens of a request in such a step: one, and the drafts that are verified.
    """

    def __init__(self, impl: Any, *, decode: bool, most_rows: int) -> None:
        self.attend, self.decode, self.most_rows = impl.forward, decode, most_rows
        self.write_step = getattr(impl, "write_step", None)  # vLLM's write before `forward`

    def __call__(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, meta: Any, output: Any, **kw: Any
    ) -> Any:
        turns = getattr(meta, "turns", None)  # of a step that may evict
        step = turns[0].step if turns else meta
        if meta is None or (self.decode and int(step.query_start_loc.diff().max()) <= self.most_rows):
            return self.attend(layer, query, key, value, kv_cache, meta, output=output, **kw)
        if self.write_step is not None:
            self.write_step(layer, key, value, kv_cache, meta)
        return output.fill_(0)


class RandomContext:
    """Replaces ``forward`` of a model with dummy weights where prompts are read: attention layers write random K and V.

    What the other layers make of random weights is as random, and takes minutes at long contexts.

    Args:
        model: of the runner.
        layers: of attention.
        most_tokens: of a step of decodes, which the model computes itself.
    """

    def __init__(self, model: Any, layers: Sequence[Any], most_tokens: int) -> None:
        self.forward, self.layers, self.most_tokens = model.forward, layers, most_tokens
        self.hidden_size: int = model.config.hidden_size

    def __call__(self, input_ids: Any, positions: Any, *args: Any, **kw: Any) -> Any:
        import torch

        n = len(input_ids)
        if n <= self.most_tokens:
            return self.forward(input_ids, positions, *args, **kw)
        dtype = next(iter(self.layers)).dtype
        for layer in self.layers:
            query, kv = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
            layer(*(torch.randn(n, width, dtype=dtype) for width in (query, kv, kv)))
        return torch.zeros(n, self.hidden_size, dtype=dtype)


class TurnsWorker:
    """One engine, in the process that it is made in: prepares a batch when told to, and decodes when it is its turn."""

    def __init__(self, chosen: Engine, model: Path, text: Sequence[int] | None, room: Case, *, dummy: bool) -> None:
        import torch
        from vllm import LLM, SamplingParams

        # The shared prompt, a tail of its own for each request, and room for our larger pages. Where tokens are evicted
        # nothing is shared, but a prompt is cut to its budget before the next one is read.
        max_context, n_prompts = room.context, 1 if text is None else room.batch
        self.kv_bytes = (
            ModelShape.of(model).dense_bytes * (max_context * n_prompts + N_TAIL * (room.batch + 2)) * 5 // 4
        )
        llm = LLM(
            str(model),
            load_format="dummy" if dummy else "auto",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=max_context + N_TAIL,
            max_num_batched_tokens=N_BATCHED,
            kv_cache_memory_bytes=self.kv_bytes,
            disable_log_stats=True,
            **chosen.arguments,
        )
        self.engine: Any = llm.llm_engine
        self.report = engine_report(self.engine.vllm_config)
        speculative = self.engine.vllm_config.speculative_config
        most_rows = 1 if speculative is None else 1 + speculative.num_speculative_tokens
        client: Any = self.engine.engine_core
        self.core: Any = client.engine_core  # it runs in this process
        self.runner: Any = self.core.model_executor.driver_worker.worker.model_runner
        layers = list(self.engine.vllm_config.compilation_config.static_forward_context.values())
        if text is None or chosen.skip_attention:
            for layer in layers:
                decode = not chosen.skip_attention
                layer.impl.forward = SkippedAttention(layer.impl, decode=decode, most_rows=most_rows)
        if dummy:
            self.runner.model.forward = RandomContext(self.runner.model, layers, room.batch * most_rows)
        if speculative is not None and chosen.acceptance is not None:
            sampler = self.runner.rejection_sampler
            sampler.forward = ForcedAcceptance(sampler, chosen.acceptance)
        self.text = text
        self.prompt = torch.randint(10, 1000, (max_context,), generator=torch.Generator().manual_seed(0)).tolist()
        self.params = SamplingParams(temperature=0, max_tokens=N_ANSWER, ignore_eos=True, detokenize=False)
        self.n_prepared = 0

    def describe(self) -> dict[str, Any]:
        """The classes that run, how the cache is cut, and how many threads compute."""
        import torch

        return {
            "report": self.report,
            "kv_capacity_tokens": self.engine.vllm_config.cache_config.kv_cache_size_tokens,
            "kv_bytes": self.kv_bytes,
            "threads": torch.get_num_threads(),
            **layout_in_use(self.engine).fields,
        }

    def prepare(self, case: Case) -> None:
        """Fill the cache, and let every request decode its first token."""
        running = [request.request_id for request in self.engine.output_processor.request_states.values()]
        self.engine.abort_request(running, internal=True)
        self.n_prepared += 1
        for i in range(case.batch):
            params = self.params.clone()
            params.extra_args = case.asked(i)
            self.engine.add_request(f"{self.n_prepared}-{i}", {"prompt_token_ids": self._prompt(i, case)}, params)
        while len(self.core.scheduler.running) < case.batch or not all(self._n_tokens().values()):
            self.engine.step()

    def choosing(self) -> int:
        """Running requests of which the layers know that they have chosen what is read."""
        layers = self.engine.vllm_config.compilation_config.static_forward_context.values()
        known = {name for layer in layers for name in layer.impl.requests.policies}
        return sum(request.request_id in known for request in self.core.scheduler.running)

    def _prompt(self, i: int, case: Case) -> list[int]:
        """The one that all share, or the i-th of as many pieces of the text."""
        if self.text is None:
            return self.prompt[: case.context]
        start = i * ((len(self.text) - case.context) // case.batch)
        return list(self.text[start : start + case.context])

    def _n_tokens(self) -> dict[str, int]:
        return {request.request_id: request.num_output_tokens for request in self.core.scheduler.running}

    def decode(self, n_steps: int) -> Turn:
        """The next steps."""
        turn = Turn()
        for _ in range(n_steps):
            before = self._n_tokens()
            drafted = {one.request_id: len(one.spec_token_ids) for one in self.core.scheduler.running}
            begin = time.perf_counter()
            self.engine.step()
            turn.seconds.append(time.perf_counter() - begin)
            gained = {name: n - before[name] for name, n in self._n_tokens().items()}
            turn.n_tokens += sum(gained.values())
            turn.verified += [(n, gained[name] - 1) for name, n in drafted.items() if n]
        return turn

    def verified(self, n_steps: int) -> list[tuple[int, int]]:
        """What becomes of drafts in the next steps, which draft whether it pays or not; nothing of other engines."""
        if self.engine.vllm_config.speculative_config is None:
            return []
        self.runner.drafter.pace.always = True
        found = self.decode(n_steps).verified
        self.runner.drafter.pace.always = False
        return found
