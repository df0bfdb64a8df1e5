"""Rows of a step whose requests have chosen for themselves how much is read (`attention_backends.choices`).

Rows that are read alike make one call of an op, over tables of their own; which they are is worked out once per step.
What a row reads does not depend on the rows beside it, nor does its answer, but for how sums are rounded (contexts are
cut so that all threads have work, and parts summed apart). A step in which nobody has chosen is as if there were no
choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_sparq.attention_backends.steps.arrivals import on_device
from vllm_sparq.config import Options


@dataclass(frozen=True)
class PolicyRows:
    """Rows that are read alike, and what a decode op needs of them.

    Attributes:
        options: of their requests; None for the engine's.
        rows: int64 [n], among the rows that were sorted; None for all of them, in their order.
        block_table: int32 [n, M]; seq_lens: int32 [n].
    """

    options: Options | None
    rows: torch.Tensor | None
    block_table: torch.Tensor
    seq_lens: torch.Tensor


def by_policy(
    policies: Sequence[Options | None], block_table: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[PolicyRows, ...]:
    """Rows sorted by the options of their requests; empty where all are the engine's.

    Args:
        policies: of each row's request, None for the engine's; fewer than rows where nobody has options of its own.
        block_table: int32 [>= n, M]; seq_lens: int32 [>= n], of the rows.
    """
    rows: dict[Options | None, list[int]] = {}
    for row, options in enumerate(policies):
        rows.setdefault(options, []).append(row)
    if not any(rows):
        return ()
    if len(rows) == 1:
        return tuple(PolicyRows(options, None, block_table, seq_lens) for options in rows)
    sorted_rows = []
    for options, those in rows.items():
        index = on_device(those, torch.int64, block_table.device)
        sorted_rows.append(PolicyRows(options, index, block_table[index], seq_lens[index]))
    return tuple(sorted_rows)
