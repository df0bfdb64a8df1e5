"""What our workers add to vLLM's own: what layers must know of their engine, and a report of what really runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_pp_group
from vllm.logger import init_logger

from vllm_sparq.attention_backends.choices import asked_for, chosen
from vllm_sparq.attention_backends.chunks import chunks_elsewhere
from vllm_sparq.attention_backends.drafting import SelfDrafter
from vllm_sparq.attention_backends.engine import PagedEngine, heads_of, selected_backends
from vllm_sparq.attention_backends.found import layers_by_backend, silence_refusal
from vllm_sparq.attention_backends.impl import PagedImpl
from vllm_sparq.attention_backends.keys import bias_warning, biased_projections, is_fragile
from vllm_sparq.attention_backends.positions import turning_of
from vllm_sparq.attention_backends.refusals import CANNOT_START, engine_refusals
from vllm_sparq.attention_backends.shared_pages import share_pages
from vllm_sparq.attention_backends.steps.requests import StepRequests
from vllm_sparq.config import Options
from vllm_sparq.retention import PHASES
from vllm_sparq.scheduler.spec import StagedSpec, know_each_other

logger = init_logger("vllm.sparq")


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
    """Tells layers what they cannot learn from vLLM: whose requests a step brings, and which engine is theirs."""

    _requests: StepRequests | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, and let our layers ask the model runner about requests.

        Raises:
            ValueError: vLLM has made of the configuration, since our platform looked at it, what cannot be served; or
                no layer of the loaded model runs on a backend of ours.
        """
        refusals = engine_refusals(self.vllm_config)  # type: ignore[attr-defined]
        if refusals and selected_backends(self.vllm_config):  # type: ignore[attr-defined]
            raise ValueError(CANNOT_START + "; ".join(refusals))
        with chunks_elsewhere(self.vllm_config):  # type: ignore[attr-defined]
            super().load_model(*args, **kwargs)  # type: ignore[misc]
        self._check_found()
        self._requests = StepRequests(self.model_runner)  # type: ignore[attr-defined]
        for impl in self._impls():
            impl.requests = self._requests
        self._turn_queries()
        self._warn_of_biases()
        self._share_pages()
        self._hand_over_runner()
        if hasattr(self.model_runner, "gather_batch_req_state"):  # type: ignore[attr-defined]
            self._follow_second_runner(self.model_runner)  # type: ignore[attr-defined]

    def _impls(self) -> list[PagedImpl]:
        """The layers that are ours."""
        return [layer.impl for layer in self._layers()]

    def _layers(self) -> list[Any]:
        """Those that run on an implementation of ours."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()  # type: ignore[attr-defined]
        return [layer for layer in layers if isinstance(getattr(layer, "impl", None), PagedImpl)]

    def _turn_queries(self) -> None:
        """Where the first tokens are seen where they are not: by the angles of the model's own rotary embeddings."""
        try:
            for layer in self._layers():
                layer.impl.turning = turning_of(self.vllm_config, self.get_model(), layer)  # type: ignore[attr-defined]
        except ValueError as error:
            raise ValueError(CANNOT_START + str(error)) from None

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM does; the next prompt is a user's, at whose K our layers may look."""
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        for impl in self._impls():
            impl.look_at_next_keys()
        return result

    def _hand_over_runner(self) -> None:
        """A model that drafts for itself is run by vLLM's runner, which our proposer is not told of."""
        drafter = getattr(self.model_runner, "drafter", None)  # type: ignore[attr-defined]
        if isinstance(drafter, SelfDrafter):
            drafter.runner = self.model_runner  # type: ignore[attr-defined]

    def _warn_of_biases(self) -> None:
        """Where blocks are stored in a format that the biases of this model's K do not fit into."""
        formats = {impl.options.format for impl in self._impls() if is_fragile(impl.options)}
        n_biased = biased_projections(self.get_model()) if formats else 0  # type: ignore[attr-defined]
        for name in formats if n_biased else ():
            logger.warning_once(bias_warning(name, n_biased))

    def _follow_second_runner(self, runner: Any) -> None:
        """Model runner V2: learn which requests a step of the model brings, and keep prompts out of its graphs.

        It takes a prompt's last token, where that comes alone, for a decode, which a full graph would read sparsely:
        what a request answers would depend on how its prompt was cut. A drafting head chooses its graph by the batch.
        """
        gather, prepare = runner.gather_batch_req_state, runner.model_state.prepare_attn
        requests = self._requests
        assert requests is not None

        def gather_batch_req_state(*args: Any, **kwargs: Any) -> Any:
            batch, n_uniform = gather(*args, **kwargs)
            if batch is None or not batch.has_prefill:
                return batch, n_uniform
            return batch._replace(decode_graph_eligible=False), None

        def prepare_attn(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            requests.batch = input_batch
            try:
                return prepare(input_batch, *args, **kwargs)
            finally:
                requests.batch = None

        runner.gather_batch_req_state, runner.model_state.prepare_attn = gather_batch_req_state, prepare_attn

    def _check_found(self) -> None:
        """That a layer of the model, be it in another stage of the pipeline, runs on a backend of ours."""
        config = self.vllm_config  # type: ignore[attr-defined]
        if not selected_backends(config):
            return
        found, stages = layers_by_backend(config), get_pp_group()
        if stages.world_size > 1:
            of_stages: list[dict[str, int]] = [{}] * stages.world_size
            torch.distributed.all_gather_object(of_stages, found, group=stages.cpu_group)
            found = sum(map(Counter, of_stages), Counter())
        refusal = silence_refusal(config, found)
        if refusal is not None:
            raise ValueError(CANNOT_START + refusal)

    def _chosen(self, sampling_params: Any) -> Options | None:
        """What a request has chosen to be read of it; the front end has made sure that it can be."""
        asked = asked_for(getattr(sampling_params, "extra_args", None))
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        engine = None if asked is None else PagedEngine.of(config)
        return None if engine is None else chosen(engine, heads_of(config.model_config, config.parallel_config), asked)

    def _share_pages(self) -> None:
        """Let the model runner, whoever asks it for KV cache specs, answer with ones that share pages."""
        runner, config = self.model_runner, self.vllm_config  # type: ignore[attr-defined]
        specs_of_layers, layers = runner.get_kv_cache_spec, config.compilation_config.static_forward_context

        def get_kv_cache_spec() -> Any:
            specs = share_pages(specs_of_layers(), config, lambda name: layers[name].get_attn_backend())
            for name, spec in specs.items():
                if isinstance(spec, StagedSpec):
                    layers[name].impl.room = spec.room
            return know_each_other(specs)

        runner.get_kv_cache_spec = get_kv_cache_spec

    def get_kv_cache_spec(self) -> Any:
        """As vLLM does, with this engine as the current one: a backend is asked for its page size by class alone."""
        with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
            return super().get_kv_cache_spec()  # type: ignore[misc]

    def determine_available_memory(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does; where it captures graphs to measure them, it asks for page sizes here too."""
        try:
            with set_current_vllm_config(self.vllm_config):  # type: ignore[attr-defined]
                return super().determine_available_memory(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._let_go_of_pages()

    def shutdown(self) -> None:
        """As vLLM does; a model may outlive it, and its cache should not."""
        self._let_go_of_pages()
        super().shutdown()  # type: ignore[misc]

    def _let_go_of_pages(self) -> None:
        """Views of a cache keep all of it: what vLLM has measured graphs with, or what it has taken away."""
        for impl in self._impls():
            impl.forget_pages()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take along what our scheduler says about budgets, vLLM's own says nothing; and what requests have chosen."""
        if self._requests is not None:
            self._requests.phases = getattr(scheduler_output, PHASES, {})
            self._requests.follow(scheduler_output, self._chosen)
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
