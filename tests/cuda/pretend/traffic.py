"""What a piece of code reads from the device, and what it sends there: counted, since neither costs anything here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.utils import torch_utils

from tests.cuda.pretend.graphs import HOST_READS

METHODS = ("tolist", "numpy", "cpu", "to")


class Traffic(TorchDispatchMode):
    """Counts while it is entered.

    A tensor is on the host if it is one of ``host``, or made of such alone, or made without being told a device.

    Attributes:
        reads: what read from the device.
        copies: what sent to it.
    """

    def __init__(self, host: Iterable[torch.Tensor | None]) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.copies: list[str] = []
        self._host = {t.untyped_storage().data_ptr() for t in host if t is not None}
        self._kept: list[Any] = []  # so that no address is used twice

    def __enter__(self) -> Self:
        self._originals = {name: getattr(torch.Tensor, name) for name in METHODS}
        self._send, self._make = torch_utils.async_tensor_h2d, torch.tensor
        for name in ("tolist", "numpy", "cpu"):
            setattr(torch.Tensor, name, self._reading(name))
        torch.Tensor.to = self._moving()  # type: ignore[method-assign, assignment]
        torch_utils.async_tensor_h2d = self._sending("async_tensor_h2d", self._send)
        torch.tensor = self._sending("torch.tensor", self._make)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)
        torch_utils.async_tensor_h2d, torch.tensor = self._send, self._make

    def on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func._schema.name in HOST_READS and not all(map(self.on_host, given)):
            self.reads.append(func._schema.name)
        out = func(*args, **kwargs)
        if all(map(self.on_host, given)) and (given or kwargs.get("device") is None):
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self._kept += made
            self._host |= {t.untyped_storage().data_ptr() for t in made}
        return out

    def _reading(self, name: str) -> Any:
        read = self._originals[name]

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.on_host(tensor):
                self.reads.append(name)
            return read(tensor, *args, **kwargs)

        return counted

    def _moving(self) -> Any:
        move = self._originals["to"]

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            names_device = "device" in kwargs or any(isinstance(arg, torch.device | str) for arg in args)
            if names_device and self.on_host(tensor):
                self.copies.append("to")
            return move(tensor, *args, **kwargs)

        return counted

    def _sending(self, name: str, send: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if name != "torch.tensor" or kwargs.get("device") is not None:
                self.copies.append(name)
            return send(*args, **kwargs)

        return counted
