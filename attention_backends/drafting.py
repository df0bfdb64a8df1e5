"""Lossless: the model drafts for itself, reading few tokens, and verifies its drafts reading all of them.

vLLM's interface for proposers of a user's own (``method: custom_class``) calls `SelfDrafter.propose` at the end of each
step, with the tokens that were just sampled. The model runs on from there for a few steps under the sparse read,
greedily, and writes K and V of what it drafts into slots that the scheduler has kept free (`scheduler.drafting`). The
next step brings the drafts with their request, as any other drafts: its dense pass writes all of those slots again, and
vLLM's rejection sampler keeps what dense attention would have said. So nothing that a draft has left behind is ever
read by a step whose result counts, and the answers are those of dense attention, whatever the read.

Drafts are made for contexts that the read does not take in full, and while they pay (`attention_backends.pace`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sparq.attention_backends.engine import PagedEngine, heads_of
from vllm_sparq.attention_backends.pace import Pace

logger = init_logger("vllm.sparq")


class SelfDrafter:
    """A proposer that runs the target model itself.

    Attributes:
        runner: vLLM's model runner; our worker hands it over once the model is loaded.
        pace: decides which steps draft.
        failed: a step that drafts has raised, and none is tried again.
    """

    def __init__(self, vllm_config: Any) -> None:
        engine = PagedEngine.of(vllm_config)
        assert engine is not None
        self._config = vllm_config
        self._read = engine.read(heads_of(vllm_config.model_config, vllm_config.parallel_config))
        self._n_drafts: int = vllm_config.speculative_config.num_speculative_tokens
        self._max_model_len: int = vllm_config.model_config.max_model_len
        self.pace = Pace(self._n_drafts)
        self.failed = False
        self.runner: Any = None

    def load_model(self, *_: Any, **__: Any) -> None:
        """What vLLM's runner calls of every proposer; there is no other model than the target."""

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts of each request of the batch, none where they would not pay.

        Args:
            sampled_token_ids: of each request in this step; empty where its prompt goes on.
            num_tokens_no_spec: int [B], tokens of each request, sampled ones included.
            token_ids_cpu: int [B, max_model_len].
            slot_mappings: unused; our layers go by block tables.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [i for i, ids in enumerate(sampled_token_ids) if ids and self._pays(int(num_tokens_no_spec[i]))]
        n_drafts = 0 if self.failed else self._agreed(self.pace.n_drafts([len(ids) for ids in sampled_token_ids]))
        if not n_drafts or not rows:
            return drafts
        try:
            return self._drafts(drafts, rows, n_drafts, num_tokens_no_spec, token_ids_cpu)
        except Exception:  # whatever a model raises: what it wrote lies where nothing looks
            if get_tp_group().world_size > 1:
                raise  # the other workers wait in the middle of that step, as after any step that fails
            self.failed = True
            logger.exception(
                "lossless: a step that drafts has failed. The engine goes on without drafts: the same answers, as slow "
                "as dense attention"
            )
            return [[] for _ in sampled_token_ids]

    def _agreed(self, n_drafts: int) -> int:
        """The first worker's number: each has a clock of its own, and the model runs on all of them or on none."""
        agreed: int = get_tp_group().broadcast_object(n_drafts)
        return agreed

    def _drafts(
        self,
        drafts: list[list[int]],
        rows: list[int],
        n_drafts: int,
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
    ) -> list[list[int]]:
        """``drafts`` with so many tokens for each of these rows of the batch."""
        lens = torch.from_numpy(num_tokens_no_spec[rows].astype(np.int64))
        tokens = torch.from_numpy(token_ids_cpu[rows, num_tokens_no_spec[rows] - 1].astype(np.int64))
        device = self.runner.device
        tokens, rows_there = tokens.to(device), torch.tensor(rows, device=device)
        for step in range(n_drafts):
            tokens = self._next(tokens, lens + step, rows_there)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                drafts[row].append(token)
        return drafts

    def _pays(self, n_tokens: int) -> bool:
        return n_tokens + self._n_drafts <= self._max_model_len and not self._read.is_dense(n_tokens)

    def _next(self, tokens: torch.Tensor, lens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The greedy tokens after ``tokens``, int64 [B], which are the last of requests of ``lens`` tokens."""
        runner, n = self.runner, len(tokens)
        starts = torch.arange(n + 1, dtype=torch.int32)
        seq_lens = lens.to(torch.int32)
        positions = (lens - 1).to(tokens.device)
        metadata: dict[str, Any] = {}
        for group, attention_groups in enumerate(runner.attn_groups):
            table = runner.input_batch.block_table[group].get_device_tensor(runner.input_batch.num_reqs)[rows]
            step = CommonAttentionMetadata(
                query_start_loc=starts.to(tokens.device),
                query_start_loc_cpu=starts,
                seq_lens=seq_lens.to(tokens.device),
                num_reqs=n,
                num_actual_tokens=n,
                max_query_len=1,
                max_seq_len=int(lens.max()),
                block_table_tensor=table,
                slot_mapping=positions,  # not looked at by our layers, and no others are served
                is_prefilling=torch.zeros(n, dtype=torch.bool),
                seq_lens_cpu_upper_bound=seq_lens,
            )
            for attention_group in attention_groups:
                found = attention_group.get_metadata_builder().build_drafts(step)
                metadata |= dict.fromkeys(attention_group.layer_names, found)
        with set_forward_context(metadata, self._config, num_tokens=n):
            hidden = runner.model(input_ids=tokens, positions=positions, intermediate_tensors=None, inputs_embeds=None)
            logits = runner.model.compute_logits(hidden)
        return logits.argmax(-1)  # type: ignore[no-any-return]
