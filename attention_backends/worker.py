"""What our workers add to vLLM's own: prompt lengths for the metadata, and a report of what really runs."""

from __future__ import annotations

from typing import Any

from vllm_sparq.attention_backends import metadata


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
    """Lets the metadata builder ask this worker's model runner for prompt lengths."""

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        runner = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "req_states"):  # model runner V2: requests keep their row in a table, steps name the rows
            metadata.prompt_lengths = lambda step: runner.req_states.prompt_len.cpu[step.req_idx]
        else:
            metadata.prompt_lengths = lambda step: runner.input_batch.num_prompt_tokens_cpu_tensor[: step.num_reqs]
