"""vLLM's CUDA worker with what our backends need from it."""

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from vllm_sparq.attention_backends.warm_up import warm_up
from vllm_sparq.attention_backends.worker import SparqWorkerMixin


class SparqCudaWorker(SparqWorkerMixin, Worker):
    """Chosen by our platform in place of vLLM's default worker; a worker class of the user's own is left alone."""

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM does, after our kernels are compiled: it captures graphs, where some of them run."""
        config = self.vllm_config
        warm_up(self.model_runner, config.compilation_config.static_forward_context, config.model_config.max_model_len)
        return super().compile_or_warm_up_model()
