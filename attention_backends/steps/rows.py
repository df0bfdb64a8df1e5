"""What a step brings, as the ops want it: which rows are read how."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from vllm.v1.attention.backend import AttentionMetadata

from vllm_sparq.attention_backends.steps.policies import PolicyRows
from vllm_sparq.attention_backends.steps.restored import RestorePlan
from vllm_sparq.attention_backends.steps.staged import BegunBlocks, StagedReplay
from vllm_sparq.layout import Pages


@dataclass(frozen=True)
class PrefillRows:
    """Arguments of the prefill op: requests b with rows ``query_start_loc[b] : query_start_loc[b + 1]`` of the step.

    Over quantized pages they are pieces of requests, and ``begun`` says which staged tokens their keys begin with.

    Attributes:
        seq_lens: int32 [B], slots taken with the new tokens.
        max_query_len: most rows of one request; max_seq_len: most slots. Bounds, known without asking the device.
        longest: first and last row (exclusive) of the longest piece, on the host; known over quantized pages alone.
        restores: calls for the same rows over caches restored from codes, or None where codes are read.
    """

    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    context_lens: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int
    key_start_loc: torch.Tensor | None = None
    begun: BegunBlocks | None = None
    longest: tuple[int, int] | None = None
    restores: tuple[RestorePlan, ...] | None = None
    _unwritten: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, compare=False)

    def unwritten(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [B], the page of each request's last slot, and bool [B, N], which of its slots come after that one.

        Made for the first layer that asks, from tensors on their device. A padding row has no slots: null block 0.
        """
        if block_size not in self._unwritten:
            last = self.seq_lens - 1
            column = (last // block_size).clamp(min=0).long()
            page = self.block_table.gather(1, column[:, None])[:, 0]
            slot = torch.arange(block_size, device=last.device)
            self._unwritten[block_size] = page.where(last >= 0, 0).long(), slot > (last % block_size)[:, None]
        return self._unwritten[block_size]


@dataclass(frozen=True)
class ReplayedRows:
    """Arguments of a decode op for single rows of the step: row ``rows[i]`` has ``seq_lens[i]`` tokens to look at.

    Attributes:
        owners: the request of each.
        by_policy: these rows sorted, where requests among them have chosen what is read; else empty.
    """

    rows: torch.Tensor
    rows_on_host: list[int]
    owners: list[int]
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    staged: StagedReplay | None = None
    by_policy: tuple[PolicyRows, ...] = ()

    @property
    def groups(self) -> tuple[PolicyRows, ...]:
        """The rows, those together that are read alike."""
        return self.by_policy or (PolicyRows(None, None, self.block_table, self.seq_lens),)

    def pages_seen(self, pages: Pages, key: torch.Tensor, value: torch.Tensor) -> Pages:
        """The pages that ``block_table`` speaks of, from the cache and what the prefill op was given."""
        return pages if self.staged is None else self.staged.staged_again(pages, key, value)


@dataclass(frozen=True)
class DraftRows:
    """The first rows of a step where some requests bring several after their prompt, such as drafts to verify.

    Attributes:
        block_table: int32 [n_decodes, M]; seq_lens: int32 [n_decodes], what each row may look at, 0 for padding.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class PagedMetadata(AttentionMetadata):
    """One step of one KV cache group.

    Attributes:
        n_decodes: leading rows that are read by the policy, one of each request unless ``drafts`` says otherwise.
        block_table: int32 [B, M]; query_start_loc: int32 [B + 1]; seq_lens: int32 [B], new tokens included.
        first_positions: int32 [B], the position of each request's first new token, where it is not its slot; or None.
        prefill: rows to attend densely, or None.
        replayed: rows to read by the policy although their request brings several, or None. They are part of
            ``prefill`` too; what the policy says replaces what the dense pass wrote.
        dense: whether the leading rows are read in full, whatever the policy: a step whose result counts, where the
            policy is for drafts alone.
        by_policy: the leading rows sorted, where requests among them have chosen what is read; else empty.
    """

    n_decodes: int
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    prefill: PrefillRows | None = None
    replayed: ReplayedRows | None = None
    first_positions: torch.Tensor | None = None
    drafts: DraftRows | None = None
    dense: bool = False
    by_policy: tuple[PolicyRows, ...] = ()

    @property
    def decodes(self) -> PagedMetadata | DraftRows:
        """Where the block table and the lengths of the leading rows are."""
        return self if self.drafts is None else self.drafts

    @property
    def groups(self) -> tuple[PolicyRows, ...]:
        """The leading rows, those together that are read alike."""
        return self.by_policy or (PolicyRows(None, None, self.decodes.block_table, self.decodes.seq_lens),)
