"""What runs, and what starting it leaves behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from tests.cuda.pretend.graphs import CaptureError, Graph
from tests.engine.support import EXACT

WORKER = "vllm_sparq.attention_backends.cuda_worker.SparqCudaWorker"
RUNNER = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"


def path_of(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_it_is_the_cuda_path(engine: Any, prompts: Any) -> None:
    """Ours where vLLM lets us choose, vLLM's elsewhere; decodes replay full graphs."""
    from vllm.platforms import current_platform

    with engine("sparq", EXACT["sparse"], max_model_len=512) as llm:
        assert path_of(current_platform) == "vllm_sparq.platform.SparqCudaPlatform"
        worker = worker_of(llm)
        assert (path_of(worker), path_of(worker.model_runner)) == (WORKER, RUNNER)
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        before = Graph.n_replays
        prompts.answers(llm, [prompts.of_length(300)], 9)
        assert Graph.n_replays - before >= 8


def test_a_host_read_stops_a_capture(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it not so, the pretended graphs would prove nothing."""
    from vllm_sparq.attention_backends.impl import PagedImpl

    attend = PagedImpl._attend

    def reads_a_length(self: Any, step: Any, *args: Any) -> None:
        step.seq_lens.max().item()
        attend(self, step, *args)

    monkeypatch.setattr(PagedImpl, "_attend", reads_a_length)
    with pytest.raises(CaptureError, match="not permitted when stream is capturing"), engine("sparq"):
        pass
    Graph.capturing = None


@pytest.mark.parametrize("backend", ["sparq", "kivi", "h2o"])
def test_nothing_keeps_the_cache_that_graphs_were_measured_with(
    engine: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is as large as half of the memory, and vLLM plans the real cache as if it were free."""
    from vllm.v1.worker.gpu import cudagraph_utils

    measured: list[weakref.ref[torch.UntypedStorage]] = []
    tear_down = cudagraph_utils._teardown_profiling_state

    def watched(runner: Any) -> None:
        layers = runner.compilation_config.static_forward_context.values()
        measured.extend(weakref.ref(layer.kv_cache.untyped_storage()) for layer in layers)
        assert all(storage() is not None for storage in measured)
        tear_down(runner)

    def live_bytes() -> int:
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if type(thing) is torch.Tensor and thing.dtype == torch.uint8:
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(storages.values())

    monkeypatch.setattr(cudagraph_utils, "_teardown_profiling_state", watched)
    before = live_bytes()
    arguments: dict[str, Any] = dict(kv_cache_memory_bytes=None, gpu_memory_utilization=0.01, max_model_len=512)
    with engine(backend, **arguments) as llm:
        assert measured, "graphs were not measured"
        worker = worker_of(llm)
        ours = [layer.impl for layer in worker.vllm_config.compilation_config.static_forward_context.values()]
        (cache,) = {impl._pages.data.untyped_storage().nbytes() for impl in ours}
        assert live_bytes() - before <= len(ours) * cache * 1.01
        model = worker.model_runner.model
    assert live_bytes() <= before, model


def test_short_contexts_are_read_densely(engine: Any) -> None:
    """Below the break-even of CUDA, which is not that of a CPU; a user's own number stays."""
    for options, tokens in (({}, 16384), ({"dense_below": 77}, 77)):
        with engine("sparq", options, max_model_len=512) as llm:
            ours = worker_of(llm).vllm_config.compilation_config.static_forward_context.values()
            assert {layer.impl.options.dense_below for layer in ours} == {tokens}


def test_what_warms_up_is_not_taken_for_a_prompt(engine: Any) -> None:
    """A format that some K do not fit into looks at a user's first prompt, not at what vLLM makes up before."""
    with engine("flexgen", max_num_seqs=64, max_model_len=512) as llm:
        ours = worker_of(llm).vllm_config.compilation_config.static_forward_context.values()
        assert all(layer.impl._looks_at_keys for layer in ours)


def test_the_reference_takes_part_in_no_graph(engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for lengths. Started as a user starts it, it answers as the kernels do."""
    some = [prompts.of_length(n) for n in (40, 129)]
    found = {}
    for implementation in ("cpu", "reference"):
        monkeypatch.setenv("VLLM_SPARQ_IMPL", implementation)
        with engine("sparq", EXACT["sparse"], max_model_len=512) as llm:
            found[implementation] = prompts.answers(llm, some, 6)
    assert found["reference"] == found["cpu"]
