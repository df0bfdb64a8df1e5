"""What simulated H2O ranks by: the attention that a token got, over all queries, by how many saw it, or of late."""

from __future__ import annotations

import pytest
import torch

from vllm_sparq.benchmarks.simulation.retention import ALL, DECAY, SCORES, Simulation

torch.manual_seed(0)
N = 6
K, V, Q = (torch.randn(1, 1, N + 2, 4) for _ in range(3))
WEIGHTS = (Q[0, 0] @ K[0, 0].T).masked_fill(torch.ones(N + 2, N + 2).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("by", SCORES)
def test_scores_are_those_of_their_definition(by: str) -> None:
    """A prompt of six tokens and two steps, nothing evicted; query t counts decay^(last - t)."""
    simulation = Simulation(budget=ALL, by_score=by, sinks=0)
    simulation.attend(0, Q[:, :, None, :N], K[:, :, :N], V[:, :, :N], 1.0)
    for n in (N + 1, N + 2):
        simulation.attend(0, Q[:, :, None, n - 1 : n], K[:, :, :n], V[:, :, :n], 1.0)
    counts = DECAY ** torch.arange(N + 1, -1, -1.0) if by == "decayed" else torch.ones(N + 2)
    torch.testing.assert_close(simulation.scores[0][0], counts @ WEIGHTS)


@pytest.mark.parametrize(("by", "kept"), [("sum", [0, 3]), ("mean", [2, 3]), ("decayed", [0, 3])])
def test_who_stays_is_whom_the_score_ranks_first(by: str, kept: list[int]) -> None:
    """Two of three tokens and the newest: the first one has the largest sum, and by far the most queries."""
    simulation = Simulation(budget=2 / 3, by_score=by, sinks=0, prompt_len=3)
    simulation.alive[0] = torch.ones(1, 4).bool()
    simulation.scores[0] = torch.tensor([[1.5, 0.2, 0.9, 0.0]])
    simulation.bury(0)
    assert simulation.alive[0][0].nonzero().flatten().tolist() == kept
