"""CUDA graphs over tensors in memory: what a step launches is recorded, and replayed without the Python around it.

As in a real graph, everything that Python decided while the graph was captured stays as it was decided, results are
written where they were written then, and the host can read nothing from the device meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero")


class CaptureError(RuntimeError):
    """What CUDA would refuse while a stream is captured."""

    def __init__(self, what: str) -> None:
        super().__init__(f"CUDA error: operation not permitted when stream is capturing ({what})")


class Graph:
    """`torch.cuda.CUDAGraph`."""

    capturing: ClassVar[Graph | None] = None
    n_captures: ClassVar[int] = 0
    n_replays: ClassVar[int] = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.launches: list[Callable[[], Any]] = []
        self.pool: list[Any] = []

    def capture_begin(self, *_: Any, **__: Any) -> None:
        assert Graph.capturing is None, "captures do not nest"
        Graph.capturing = self
        Graph.n_captures += 1
        self.recorder = _Recorder(self)
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)
        Graph.capturing = None

    def replay(self) -> None:
        Graph.n_replays += 1
        with torch.inference_mode():
            for launch in self.launches:
                launch()

    def reset(self) -> None:
        self.launches.clear()
        self.pool.clear()


@contextlib.contextmanager
def capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


def record(launch: Callable[[], Any]) -> None:
    """Replay ``launch`` too: for launches that torch does not see."""
    if Graph.capturing is not None:
        Graph.capturing.launches.append(launch)


class _Recorder(TorchDispatchMode):
    """Records the ops of torch."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in HOST_READS:
            raise CaptureError(name)
        out = func(*args, **kwargs)
        self.graph.pool.append((args, kwargs, out))  # kept alive, as by the graph's own pool of memory
        if name.startswith(("aten::empty", "aten::new_empty")):
            return out
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        fresh = [t.untyped_storage().data_ptr() not in given for t in outs]
        if not func._schema.is_mutable and not any(fresh):
            return out  # a view

        def again() -> None:
            now = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for old, new, is_fresh in zip(outs, now, fresh, strict=True):
                if is_fresh:
                    old.copy_(new)

        self.graph.launches.append(again)
        return out


def guard_host_reads() -> None:
    """`tolist`, `numpy` and `cpu` stop a capture; torch dispatches nothing for them where tensors are in memory."""
    for name in ("tolist", "numpy", "cpu"):
        setattr(torch.Tensor, name, _guarded(name, getattr(torch.Tensor, name)))


def _guarded(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if Graph.capturing is not None and "triton" not in sys._getframe(1).f_code.co_filename:
            raise CaptureError(f"Tensor.{name}")
        return read(self, *args, **kwargs)

    return guarded
