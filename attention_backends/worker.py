"""What our workers add to vLLM's own: prompt lengths for the metadata, and a report of what really runs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vllm_sparq.attention_backends.steps import builder
from vllm_sparq.retention import PHASES, Phase


class AttentionReport:
    """A worker extension (vLLM's ``--worker-extension-cls``) that says which attention classes the worker runs.

    Our own workers have it built in; naming it for any other backend makes the two comparable.
    """

    def attention_report(self) -> dict[str, dict[str, Any]]:
        """layer -> backend, implementation class, and for our layers what they read and write with."""
        context = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        report = {}
        for name, layer in context.items():
            impl = getattr(layer, "impl", None)
            if impl is None:
                continue
            report[name] = {"backend": layer.get_attn_backend().get_name(), "impl": type(impl).__name__}
            describe = getattr(impl, "describe", None)
            if describe is not None:
                report[name].update(describe())
        return report


class SparqWorkerMixin(AttentionReport):
    """Lets the metadata builder ask this worker for prompt lengths and shrunk budgets."""

    _phases: Mapping[str, Phase] = MappingProxyType({})

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        runner = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "req_states"):  # model runner V2: requests keep their row in a table, steps name the rows
            builder.prompt_lengths = lambda step: runner.req_states.prompt_len.cpu[step.req_idx]
        else:
            builder.prompt_lengths = lambda step: runner.input_batch.num_prompt_tokens_cpu_tensor[: step.num_reqs]

        def phases(step: Any) -> list[Phase | None]:
            if not self._phases:
                return [None] * step.num_reqs
            if hasattr(runner, "req_states"):
                ids = [runner.req_states.index_to_req_id[int(row)] for row in step.req_idx[: step.num_reqs].cpu()]
            else:
                ids = runner.input_batch.req_ids[: step.num_reqs]
            return [self._phases.get(request_id) for request_id in ids]

        builder.shrunk_phases = phases

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take along what our scheduler says about budgets; vLLM's own says nothing."""
        self._phases = getattr(scheduler_output, PHASES, {})
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
