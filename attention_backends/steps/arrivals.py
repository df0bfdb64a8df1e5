"""What arriving tokens of answers find, for a step of nothing but decodes: `Retention.arrival` on the device.

The number of tokens that stay follows from a token's position and its request's prompt. So a step of decodes needs no
number from the host: its lengths are worked out where its kernels run, into tensors that stay in their place. A CUDA
graph that has been captured once evicts rightly in every step it is replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_sparq.retention import Phase, Retention


class Arrivals(NamedTuple):
    """All int32 [B].

    Attributes:
        positions: of the arriving token in its request.
        held: slots taken before.
        kept: slots that stay, and the slot that it takes.
        seq_lens: slots taken then; 0 for padding.
        recent_from: position from which tokens stay whatever their rank.
    """

    positions: torch.Tensor
    held: torch.Tensor
    kept: torch.Tensor
    seq_lens: torch.Tensor
    recent_from: torch.Tensor


def arrivals(
    seq_lens: torch.Tensor, prompt_lens: torch.Tensor, retention: Retention, shrunk: torch.Tensor | None = None
) -> Arrivals:
    """Of one token for each request, after its prompt; nothing is read back to the host.

    Args:
        seq_lens: int [B], tokens of each request so far, evicted ones and the arriving one included; 0 for padding.
        prompt_lens: int [B].
        retention: numbers of the engine.
        shrunk: int64 [B, 3], start, held and budget of the requests whose budget was shrunk, -1 for the others; or
            None where there are none.
    """
    positions, prompt = seq_lens.long() - 1, prompt_lens.long()
    phase = _phases(prompt, retention)
    if shrunk is not None:
        theirs = _Phases(*shrunk.unbind(1))
        phase = _Phases(*(torch.where(theirs.start >= 0, new, old) for new, old in zip(theirs, phase, strict=True)))
    budget, interval = phase.budget, retention.interval
    first = torch.where(phase.held < budget, phase.held, budget - interval)
    slots = first + positions - phase.start
    since = (slots - budget) % interval
    kept = torch.where(slots < budget, slots, budget - interval + since)
    held = torch.where((slots < budget) | (since > 0), kept, budget)
    begins = positions == phase.start
    kept, held = torch.where(begins, first, kept), torch.where(begins, phase.held, held)
    recent_from = positions + 1 - _recent_of(budget, retention)
    used = positions >= 0
    found = positions, held, kept, kept + 1, recent_from
    return Arrivals(*(torch.where(used, numbers, 0).int() for numbers in found))


class _Phases(NamedTuple):
    """`vllm_sparq.retention.Phase` of each request, int64 [B]."""

    start: torch.Tensor
    held: torch.Tensor
    budget: torch.Tensor


def _phases(prompt: torch.Tensor, retention: Retention) -> _Phases:
    """`Retention.answer`."""
    if isinstance(retention.budget, int):
        budget = torch.full_like(prompt, retention.budget_of(0))
    else:
        share = torch.ceil(retention.budget * prompt.double()).long()
        if retention.interval > 1:
            share = -(-share // retention.block_size) * retention.block_size
        budget = share.clamp(min=retention.least_budget)
    held = prompt
    if retention.bounded:
        last = prompt - 1
        start = last - last % retention.segment
        held = torch.where(prompt > 0, torch.minimum(start, budget) + prompt - start, 0)
    return _Phases(prompt, held, budget)


def _recent_of(budget: torch.Tensor, retention: Retention) -> torch.Tensor:
    """`Retention.recent_of`."""
    room = budget - retention.interval - retention.sinks
    wanted = budget // 2 if retention.recent is None else torch.full_like(budget, retention.recent)
    return torch.minimum(wanted, room.clamp(min=0) + 1)


@dataclass
class Phases:
    """The shrunk budgets of a batch on the device; sent there when they change, which is seldom."""

    device: torch.device
    _known: tuple[Phase | None, ...] = ()
    _sent: torch.Tensor | None = None

    def on_device(self, phases: list[Phase | None]) -> torch.Tensor | None:
        """`arrivals`'s ``shrunk``; ``phases`` in the order of the batch."""
        if not any(phases):
            return None
        if self._known != (now := tuple(phases)):
            numbers = [(-1, -1, -1) if phase is None else (phase.start, phase.held, phase.budget) for phase in now]
            self._known, self._sent = now, on_device(numbers, torch.int64, self.device)
        return self._sent


def int32(numbers: list[int], device: torch.device) -> torch.Tensor:
    """`on_device`."""
    return on_device(numbers, torch.int32, device)


def int64(numbers: list[int], device: torch.device) -> torch.Tensor:
    """`on_device`."""
    return on_device(numbers, torch.int64, device)


def on_device(numbers: object, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of numbers of the host, without waiting for the device."""
    from vllm.utils.torch_utils import async_tensor_h2d

    return async_tensor_h2d(numbers, device=device, dtype=dtype)  # type: ignore[arg-type]
