"""First tokens that seem nearer than they are, through the engine: token by token what a simulation says.

The simulation is Hugging Face's model with an attention of this file. It takes the rotation off every query and key and
puts on the one of the distance that the definition says, for each pair of tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.engine.support import MODEL, Prompts
from tests.engine.test_states import counted
from vllm_sparq.benchmarks.simulation.model import load, running

pytestmark = pytest.mark.engine

BUDGET, SINKS, SEGMENT, TRAINED = 96, 4, 256, 352
N_ANSWER = 12
OPTIONS = {"budget": BUDGET, "prefill": "bounded"}
WAYS: dict[str, dict[str, Any]] = {
    "original": OPTIONS,
    "renumbered": {**OPTIONS, "positions": "renumbered", "trained": TRAINED},
    "capped": {**OPTIONS, "positions": "capped", "trained": TRAINED},
}


@pytest.fixture(scope="module")
def some(prompts: Prompts) -> list[list[int]]:
    rng = random.Random(5)
    return [prompts.of_length(130), prompts.of_length(600), [rng.randrange(3, 1000) for _ in range(550)]]


Answers = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def alone(engine: Any, some: Any) -> dict[str, list[Answers]]:
    """Of each way: tokens and their log-probabilities, of every prompt by itself."""
    found = {}
    for way, options in WAYS.items():
        with engine("streaming", options, block_size=32) as llm:
            found[way] = [answered(llm, [prompt])[0] for prompt in some]
    return found


@dataclass
class Simulation:
    """One request, whose prompt has ``prompt_len`` tokens."""

    way: str
    prompt_len: int
    theta: float

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [1, G, H/G, T, D], k and v [1, G, S, D]; returns [1, G, H/G, T, D]."""
        n_rows, n_tokens = q.shape[3], k.shape[2]
        rows = range(n_tokens - n_rows, n_tokens)
        alive = torch.stack([self.alive(i, n_tokens) for i in rows])  # [T, S]
        distance = torch.stack([self.distance(i, of_row) for i, of_row in zip(rows, alive, strict=True)])
        tokens, d = torch.arange(n_tokens), q.shape[-1] // 2
        frequency = self.theta ** -(torch.arange(d) / d)

        def bare(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            """Pairs of channels as complex numbers, as they were before they were rotated."""
            return torch.complex(x[..., :d], x[..., d:]) * torch.exp(-1j * positions[:, None] * frequency)

        query, key = bare(q[0], tokens[n_tokens - n_rows :]), bare(k[0], tokens)
        logits = torch.zeros(*q.shape[1:4], n_tokens)
        for c in range(d):
            turn = torch.exp(1j * distance * frequency[c])  # [T, S]
            pairs = query[..., c, None] * key[:, None, None, :, c].conj()  # [G, H/G, T, S]
            logits += (pairs * turn).real
        weights = (scale * logits).masked_fill(~alive, -torch.inf).softmax(-1)
        return (weights @ v[0][:, None])[None]

    def alive(self, i: int, n_tokens: int) -> torch.Tensor:
        """Who is there when token i looks: the first and the newest, and of a prompt what has come since it was cut."""
        j = torch.arange(n_tokens)
        since = i - i % SEGMENT if i < self.prompt_len else i + 1
        newest_from = since - (BUDGET - SINKS)
        return (j <= i) & ((j < SINKS) | (j >= newest_from))

    def distance(self, i: int, alive: torch.Tensor) -> torch.Tensor:
        j = torch.arange(len(alive))
        if self.way == "capped":
            return (i - j).clamp(max=TRAINED)
        place = alive.cumsum(0) - 1
        return place[i] - place if self.way == "renumbered" else i - j


@torch.inference_mode()
def simulated(model: Any, prompt: list[int], way: str) -> Answers:
    """A greedy answer, and the log-probabilities of its tokens."""
    from transformers import DynamicCache

    cache, ids = DynamicCache(), torch.tensor([prompt])
    found: Answers = ([], [])
    theta = float(model.config.rope_parameters["rope_theta"])
    with running(Simulation(way, len(prompt), theta)):
        for _ in range(N_ANSWER):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            best = logits.log_softmax(-1).max(-1)
            found[0].append(int(best.indices))
            found[1].append(float(best.values))
            ids = best.indices.view(1, 1)
    return found


def answered(llm: Any, prompts: list[list[int]], n_tokens: int = N_ANSWER) -> list[Answers]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False, logprobs=0)
    outs = [one.outputs[0] for one in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)]
    return [
        (list(o.token_ids), [step[t].logprob for step, t in zip(o.logprobs, o.token_ids, strict=True)]) for o in outs
    ]


@pytest.mark.parametrize("way", WAYS)
def test_token_by_token_it_is_a_simulation_from_keys_without_rotation(way: str, alone: Any, some: Any) -> None:
    model, _ = load(MODEL)
    for prompt, (tokens, logprobs) in zip(some, alone[way], strict=True):
        wanted, wanted_logprobs = simulated(model, prompt, way)
        assert tokens == wanted
        torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(wanted_logprobs), atol=2e-3, rtol=0)


def test_in_a_batch_and_in_other_chunks_as_alone(alone: Any, engine: Any, some: Any) -> None:
    with engine("streaming", WAYS["capped"], block_size=32, max_num_batched_tokens=96, max_num_seqs=8) as llm:
        assert [tokens for tokens, _ in answered(llm, some)] == [tokens for tokens, _ in alone["capped"]]


@pytest.mark.parametrize(
    ("way", "n_answer"), [("renumbered", 220), pytest.param("capped", 400, marks=pytest.mark.long)]
)
def test_preemption(way: str, n_answer: int, engine: Any) -> None:
    """Requests that are thrown out in their answers come back, and see their first tokens where these seemed to be."""
    rng = random.Random(1)
    batch = [[rng.randrange(3, 1000) for _ in range(n)] for n in (70, 80, 95, 60, 75, 90)]
    options = {"budget": 192, "prefill": "bounded", "positions": way, "trained": 192 + SEGMENT}
    pool = dict(num_gpu_blocks_override=22, block_size=32, max_model_len=512, max_num_batched_tokens=512)
    with engine("streaming", options, **pool, disable_log_stats=False) as llm:
        together = answered(llm, batch, n_answer)
        assert counted(llm, "num_preemptions") > 0
    with engine("streaming", options, **{**pool, "num_gpu_blocks_override": None}) as llm:
        roomy = answered(llm, batch, n_answer)
    with engine("streaming", {"budget": 192, "prefill": "bounded"}, **pool) as llm:
        original = answered(llm, batch, n_answer)
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in roomy]
    found, wanted, other = (torch.tensor([scores for _, scores in one]) for one in (together, roomy, original))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert float((found - other).abs().max()) > 2e-3  # of their tokens alone nothing would show


@pytest.mark.long
def test_tensor_parallel(alone: Any, engine: Any, some: Any) -> None:
    """Each worker turns the queries of its heads."""
    with engine("streaming", WAYS["capped"], block_size=32, tensor_parallel_size=2) as llm:
        assert [tokens for tokens, _ in answered(llm, some)] == [tokens for tokens, _ in alone["capped"]]
        reports = llm.collective_rpc("attention_report")
    assert [{layer["backend"] for layer in report.values()} for report in reports] == [{"STREAMING"}] * 2


def test_they_differ_where_tokens_are_far_away(alone: Any) -> None:
    """Or else nothing above would show."""
    (_, original), (_, renumbered), (_, capped) = (alone[way][-1] for way in WAYS)
    assert abs(original[0] - renumbered[0]) > 0.005
    assert abs(original[0] - capped[0]) > 0.005
    assert abs(renumbered[0] - capped[0]) > 0.005
