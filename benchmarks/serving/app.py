"""A Ray Serve LLM application: the OpenAI API on replicas of one engine, on one machine or many.

    serve run benchmarks/serving/config.yaml

Needs ray[serve]; every node needs vLLM, this plugin and the model at the same path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.deployment import LLMServer

from vllm_sparq import plugin
from vllm_sparq.benchmarks.cluster.replicas import REPLICA_ENVIRONMENT, engine_arguments, proven
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import check_model


class ServeArguments(BaseModel):
    """What may stand under ``args`` in the configuration of the application."""

    model_config = ConfigDict(extra="forbid")

    model: Path = WEIGHTS
    """A model folder; without it, the bundled model."""
    name: str = "sparq"
    """What clients call the model."""
    method: str = "sparq"
    """As everywhere: dense, sparq, kivi, sparq+int4, ..."""
    options: dict[str, Any] = Field(default_factory=dict)
    """On top of what the method stands for."""
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)
    kv_cache_mib: int | None = Field(default=None, ge=1)
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """More engine arguments of vLLM's."""


class ProvingServer(LLMServer):
    """A replica that comes up only if its engine runs the attention that it was given."""

    async def start(self) -> None:
        """Start the engine and ask its workers.

        Raises:
            WrongAttentionError: they run another attention.
        """
        # Ray Serve validates engine arguments here, before anything has loaded vLLM's plugins (ray#64594).
        plugin.register()
        await super().start()  # type: ignore[no-untyped-call]
        given = self._llm_config.engine_kwargs
        method = Method(name=given.get("attention_backend") or "dense", backend=given.get("attention_backend"))
        engine: Any = self.engine
        proven(method, await engine.collective_rpc("attention_report"))


def build(arguments: dict[str, Any]) -> Any:
    """The application, for ``import_path`` of a Serve configuration.

    Raises:
        pydantic.ValidationError: an argument that is not one of `ServeArguments`.
        UsageError: an unknown method, or no model.
    """
    given = ServeArguments(**arguments)
    method = Method.named(given.method, given.options)
    model = check_model(given.model)
    plugin.register()
    config = LLMConfig(
        model_loading_config={"model_id": given.name, "model_source": str(model)},
        deployment_config={"num_replicas": given.replicas},
        placement_group_config={"bundles": [{"CPU": given.cpus, "GPU": given.gpus}]},
        engine_kwargs=engine_arguments(
            method, gpus=given.gpus, kv_cache_mib=given.kv_cache_mib, more=given.engine_args
        ),
        runtime_env={"env_vars": REPLICA_ENVIRONMENT},
        server_cls=ProvingServer,
        log_engine_metrics=False,
    )
    # The API's own processes mostly wait. Did they reserve CPUs, two cores would have none left for a replica.
    ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
    return build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})
