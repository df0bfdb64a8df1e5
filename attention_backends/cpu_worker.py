"""vLLM's CPU worker with what our backends need from it."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sparq.attention_backends.worker import SparqWorkerMixin


class SparqCpuWorker(SparqWorkerMixin, CPUWorker):
    """Chosen by our platform in place of vLLM's default worker; a worker class of the user's own is left alone."""
