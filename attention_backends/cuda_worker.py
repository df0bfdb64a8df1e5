"""vLLM's CUDA worker with what our backends need from it."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_sparq.attention_backends.worker import SparqWorkerMixin


class SparqCudaWorker(SparqWorkerMixin, Worker):
    """Chosen by our platform in place of vLLM's default worker; a worker class of the user's own is left alone."""
