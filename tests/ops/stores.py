"""Which programs of a launch store where, in Triton's interpreter: what races on a GPU has an order there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy


@contextmanager
def shared_addresses(lo: int, hi: int) -> Iterator[set[int]]:
    """The addresses in ``lo : hi`` that more than one program of a launch stores to, as they are found."""
    from triton.runtime import interpreter

    builder: Any = type(interpreter.interpreter_builder)
    store, owners, shared = builder.create_masked_store, dict[int, tuple[int, ...]](), set[int]()

    def noted(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for at in numpy.broadcast_to(ptrs.data, mask.data.shape)[mask.data].ravel().tolist():
            if lo <= at < hi and owners.setdefault(at, self.grid_idx) != self.grid_idx:
                shared.add(at)
        return store(self, ptrs, value, mask, *rest)

    def begun(self: Any, *dims: int) -> None:
        owners.clear()
        set_grid_dim(self, *dims)

    set_grid_dim = builder.set_grid_dim
    with (
        mock.patch.object(builder, "create_masked_store", noted),
        mock.patch.object(builder, "set_grid_dim", begun),
    ):
        yield shared
