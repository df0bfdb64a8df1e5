"""Policies of the read simulation: with nothing left out each is dense, and each one's choice by hand."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_sparq.benchmarks.quality.prompts import Wanted as Prompts
from vllm_sparq.benchmarks.simulation.model import Step, answer, decode, load, local_attention, read_prompts
from vllm_sparq.benchmarks.simulation.policies import (
    POLICIES,
    Dense,
    InfLLM,
    Quest,
    Shape,
    Sparq,
    Wanted,
    Window,
    rotated,
)
from vllm_sparq.benchmarks.simulation.reads import policies_at
from vllm_sparq.benchmarks.tasks.generated import score
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main
from vllm_sparq.config import Options
from vllm_sparq.console import UsageError
from vllm_sparq.reads import SparqRead

THETA = 1e4


def a_step(lengths: list[int], n_slots: int, *, group: int = 2, head_size: int = 8, seed: int = 0) -> Step:
    """Two KV heads; slots after a request's end are poisoned with what must not be seen."""
    gen = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(len(lengths), 2, n_slots, head_size, generator=gen) for _ in range(2))
    heat = torch.rand(len(lengths), 2, group, n_slots, generator=gen)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:], heat[b, :, :, length:] = 100.0, 1e6, 1e6
    q = torch.randn(len(lengths), 2, group, head_size, generator=gen)
    n = torch.tensor(lengths)
    return Step(q=q, k=k, v=v, lengths=n, n_prompt=n - 1, scale=head_size**-0.5, theta=THETA, heat=heat)


def by_hand(q: list[list[float]], keys: list[list[float]], **more: Any) -> Step:
    """One KV head whose query group is q [H/G, D]; token i's value is the i-th unit vector, so outputs are weights."""
    k = torch.tensor(keys)[None, None]
    n = k.shape[2]
    return Step(
        q=torch.tensor(q)[None, None],
        k=k,
        v=torch.eye(n)[None, None],
        lengths=torch.tensor([n]),
        n_prompt=torch.tensor([n]),
        scale=1.0,
        theta=THETA,
        **more,
    )


def read_tokens(out: torch.Tensor) -> list[int]:
    """Tokens with any weight, of the first query head."""
    return torch.nonzero(out[0, 0, 0]).flatten().tolist()


def a_read(**more: Any) -> SparqRead:
    return SparqRead(**{"r": 1, "min_k": 2, "local": 0, **more})


def dense_of(step: Step) -> torch.Tensor:
    """By another way: one request, one KV head and one query at a time."""
    out = torch.empty_like(step.q)
    for b, length in enumerate(step.lengths.tolist()):
        for g in range(step.q.shape[1]):
            for j in range(step.q.shape[2]):
                weights = (step.scale * step.k[b, g, :length] @ step.q[b, g, j]).softmax(0)
                out[b, g, j] = weights @ step.v[b, g, :length]
    return out


@pytest.mark.parametrize("name", POLICIES)
def test_with_nothing_left_out_every_policy_is_dense(name: str) -> None:
    step = a_step([40, 64, 51], 64)
    wanted = Wanted(Shape(2, 8), 1.0, Options(compression=1.0, k=63, ranking="model"))
    policy = POLICIES[name](wanted)
    if isinstance(policy, Quest):
        policy = Quest(compression=0.5)  # what the scales cost is taken off its budget
    if isinstance(policy, Window):
        policy = Window(compression=0.5, positions=policy.positions)
    if isinstance(policy, InfLLM):
        policy = InfLLM(compression=0.5, shape=Shape(2, 8))
    torch.testing.assert_close(policy(step), dense_of(step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_looks_after_the_end(name: str) -> None:
    """What lies after a request is poison, and a request answers alike beside others and alone."""
    policy = POLICIES[name](Wanted(Shape(2, 8), 3.0, Options(compression=3.0, min_k=1, ranking="model")))
    both, alone = a_step([150, 97], 160), a_step([150, 97], 160)
    alone.lengths, alone.n_prompt = alone.lengths[1:], alone.n_prompt[1:]
    for part in ("q", "k", "v", "heat"):
        setattr(alone, part, getattr(alone, part)[1:, ...] if part == "q" else getattr(alone, part)[1:, :, ...])
    found = policy(both)
    assert found.abs().max() < 10
    torch.testing.assert_close(found[1:], policy(alone))
    assert not torch.allclose(found, Dense()(both), atol=1e-3)
    assert policy.share(150) < 1


def test_dense_by_hand() -> None:
    step = by_hand([[0.0, 1.0]], [[5.0, 0.0], [5.0, 1.0]])
    torch.testing.assert_close(Dense()(step)[0, 0, 0], torch.tensor([0.0, 1.0]).softmax(0))


class TestSparq:
    KEYS = ((2.0, 0.0), (0.0, 9.0), (1.0, 0.0), (3.0, 0.0), (0.0, 0.0))
    """Channel 0 ranks tokens 3, 0, 2; channel 1, which a query of mostly channel 0 does not look at, knows token 1."""

    def made(self, group: int = 1, **more: Any) -> Sparq:
        """Of two tokens beside the current one, unless told otherwise; ``block`` and ``unread`` are the policy's."""
        own = {name: more.pop(name) for name in ("block", "unread") if name in more}
        return Sparq(read=a_read(**more), shape=Shape(group, 2), **own)

    def test_ranks_with_the_largest_channel(self) -> None:
        step = by_hand([[1.0, 0.5]], list(map(list, self.KEYS)))
        assert read_tokens(self.made()(step)) == [0, 3, 4]
        assert read_tokens(self.made(r=2)(step)) == [1, 3, 4]

    def test_local_tokens_come_first(self) -> None:
        step = by_hand([[1.0, 0.5]], list(map(list, self.KEYS)))
        assert read_tokens(self.made(local=2)(step)) == [2, 3, 4]

    def test_a_group_adds_logits_or_probabilities(self) -> None:
        """Token 0 is good for both heads, token 1 by far the best of one and bad for the other."""
        keys = [[2.0, 2.0], [6.0, -9.0], [0.0, 0.0]]
        step = by_hand([[1.0, 0.0], [0.0, 1.0]], keys)
        assert read_tokens(self.made(2, r=2, min_k=1)(step)) == [0, 2]
        assert read_tokens(self.made(2, r=2, min_k=1, group_reduce="probs")(step)) == [1, 2]

    def test_mean_value_takes_what_was_not_read(self) -> None:
        step = by_hand([[1.0, 0.0]], [[x, 0.0] for x in (1.0, 2.0, 0.0, 3.0)])
        chance = torch.tensor([1.0, 2.0, 0.0, 3.0]).softmax(0)
        alpha = chance[[1, 3]].sum()
        for floor in (0.0, 0.5, 0.95):
            out = self.made(min_k=1, alpha_floor=floor)(step)[0, 0, 0]
            kept = max(floor, float(alpha))
            exact = torch.zeros(4)
            exact[[1, 3]] = chance[[1, 3]] / alpha
            torch.testing.assert_close(out, kept * exact + (1 - kept) / 4)
        assert 0.5 < alpha < 0.95

    def test_blocks_take_their_own_unread_probability(self) -> None:
        """Tokens 1 and 3 are read, 0 and 2 are not; blocks are 0, 1 and 2, 3."""
        step = by_hand([[1.0, 0.0]], [[x, 0.0] for x in (1.0, 2.0, 0.0, 3.0)])
        chance = torch.tensor([1.0, 2.0, 0.0, 3.0]).softmax(0)
        half = chance[[0, 0, 2, 2]] / 2
        out = self.made(min_k=1, alpha_floor=0.0, block=2)(step)[0, 0, 0]
        torch.testing.assert_close(out, half + chance * torch.tensor([0.0, 1.0, 0.0, 1.0]))
        out = self.made(min_k=1, alpha_floor=0.0, block=2, unread=True)(step)[0, 0, 0]
        torch.testing.assert_close(out, chance)  # a block's only unread token is its mean

    def test_share(self) -> None:
        read = SparqRead(r=8, min_k=1, k_per_token=Fraction(1, 16))
        policy = Sparq(read=read, shape=Shape(4, 64))
        assert policy.share(1600) == pytest.approx(8 / 128 + 101 / 1600)
        assert Sparq(read=read, shape=Shape(4, 64), ranking="int4").share(1600) == pytest.approx(2 / 128 + 101 / 1600)
        assert Sparq(read=read, shape=Shape(4, 64)).share(1) == 1


def test_quest_reads_the_span_with_the_largest_bound() -> None:
    """Spans of two: the second one's scales allow 4 + 4, though no token of it has both; the last one is new."""
    keys = [[3.0, 3.0], [0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [1.0, 1.0], [0.0, 0.0], [-9.0, -9.0]]
    policy = Quest(compression=1.2, span=2)
    assert policy.n_spans(7) == 1
    assert read_tokens(policy(by_hand([[1.0, 1.0]], keys))) == [6]
    policy = Quest(compression=0.9, span=2)
    assert policy.n_spans(7) == 2
    assert read_tokens(policy(by_hand([[1.0, 1.0]], keys))) == [2, 3, 6]
    assert read_tokens(policy(by_hand([[-1.0, -1.0]], keys))) == [0, 1, 6]  # least keys of 0: beats -0 of a later span
    assert Quest(compression=8).share(1024) == pytest.approx(1 / 8)


class TestInfLLM:
    def test_budget_is_split_as_published(self) -> None:
        assert InfLLM(compression=2, shape=Shape(4, 64)).split(2000) == (21, 10, 1000 - 21 - 320)

    def test_looks_up_one_block_for_all_heads(self) -> None:
        """First token 0; blocks 1-2, 3-4, 5-6; window 7-8. Heat picks the key that stands for a block."""
        keys = [
            [0.0, 0.0],
            [1.0, 1.0],
            [9.0, 9.0],
            [3.0, -2.0],
            [0.0, 0.0],
            [0.5, 0.0],
            [0.0, 0.0],
            [0.0] * 2,
            [0.0] * 2,
        ]
        heat = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 0.0]).expand(1, 1, 2, -1)
        policy = InfLLM(compression=9 / 5, shape=Shape(2, 2), block=2, n_keys=1)
        assert policy.split(9) == (1, 1, 2)
        found = policy(by_hand([[1.0, 0.0], [1.0, 0.0]], keys, heat=heat))
        assert read_tokens(found) == [0, 3, 4, 7, 8]
        found = policy(by_hand([[1.0, 0.0], [0.0, 1.0]], keys, heat=heat))  # 1 + 1 against 3 - 2
        assert read_tokens(found) == [0, 1, 2, 7, 8]

    def test_a_block_is_looked_up_once_it_has_left_the_window(self) -> None:
        keys = [[0.0, 0.0]] * 6 + [[5.0, 0.0]] * 2 + [[0.0, 0.0]]
        policy = InfLLM(compression=9 / 5, shape=Shape(1, 2), block=2, n_keys=1)
        found = policy(by_hand([[1.0, 0.0]], keys, heat=torch.ones(1, 1, 1, 9)))
        assert read_tokens(found) == [0, 1, 2, 7, 8]  # block 7-8 begins in the window, and 5-6 ties with the first

    def test_needs_heat(self) -> None:
        with pytest.raises(ValueError, match="with_heat"):
            InfLLM(compression=2, shape=Shape(1, 2))(by_hand([[1.0, 0.0]], [[0.0, 0.0]] * 80))


class TestWindow:
    def test_reads_first_and_newest(self) -> None:
        step = by_hand([[1.0, 0.0]], [[0.0, 0.0]] * 12)
        for positions in ("own", "cache", "capped"):
            assert read_tokens(Window(compression=2, positions=positions)(step)) == [0, 1, 2, 3, 10, 11]

    @pytest.mark.parametrize(("positions", "distances"), [("own", [11, 8]), ("cache", [5, 2]), ("capped", [2, 2])])
    def test_distance_of_the_first_tokens(self, positions: str, distances: list[int]) -> None:
        """All tokens have one key and query (1, 0) before rotation: a logit is the cosine of the distance."""
        unit = torch.tensor([1.0, 0.0])
        step = by_hand([[0.0, 0.0]], [[0.0, 0.0]] * 12)
        step.k = rotated(unit.expand(1, 1, 12, 2), torch.arange(12), THETA)
        step.q = rotated(unit.expand(1, 1, 1, 2), torch.tensor([11]), THETA)
        out = Window(compression=2, positions=positions)(step)[0, 0, 0]
        seen = torch.tensor([distances[0], distances[1], 0]).cos()
        torch.testing.assert_close(out[[0, 3, 11]].log().diff(), seen.diff(), rtol=1e-4, atol=1e-5)


def test_local_attention_by_hand() -> None:
    """Equal logits and a window of 2: the first token gets 1 + 1/2, those between 1/2 + 1/2, the last 1/2."""
    found = local_attention(torch.zeros(1, 1, 5, 4), torch.randn(1, 5, 4), 1.0, window=2)
    torch.testing.assert_close(found[0, 0], torch.tensor([1.5, 1.0, 1.0, 1.0, 0.5]))


def test_prompts_answered_together_answer_as_the_model_does_alone() -> None:
    """Of different lengths, through another attention of another library's, one request at a time."""
    prompts = Prompts(model=WEIGHTS, tasks=["needle", "map"], lengths=[120, 170], n=1)
    examples = prompts.examples(4096)
    model, tokenizer = load(WEIGHTS)
    together = decode(model, tokenizer, read_prompts(model, tokenizer, examples, with_heat=True), Dense())
    plain = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    alone = [answer(plain, tokenizer, example, DynamicCache()) for example in examples]
    assert [one.text for one in together] == alone
    assert all(score(example, text) == 1 for example, text in zip(examples, alone, strict=True))


def test_command_scores_the_prompts_of_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.jsonl"
    arguments = ["--policies", "sparq,infllm", "--tasks", "needle", "--lengths", "200", "--n", "3"]
    assert main(["research", "reads", *arguments, "--compression", "1", "--out", str(out)]) == 0
    dense, sparq, infllm = map(json.loads, out.read_text().splitlines())
    assert [dense["method"], sparq["method"], infllm["method"]] == ["dense", "sparq 1/1", "infllm 1/1"]
    assert dense["score"] == 100
    assert [one["output"] for one in sparq["answers"]] == [one["output"] for one in dense["answers"]]
    assert sparq["difference"] == infllm["difference"] == 0
    assert "100.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "compression", "options", "said"),
    [
        (["sparqq"], "8", {}, "unknown policy 'sparqq': choose from sparq"),
        (["sparq"], "x", {}, "--compression x"),
        (["sparq"], "8", {"kk": 1}, "unknown sparq option 'kk'"),
    ],
)
def test_refuses_what_means_nothing(names: list[str], compression: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        policies_at(names, [compression], options, Shape(4, 64))


def test_refuses_embeddings_that_it_cannot_rotate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in WEIGHTS.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((WEIGHTS / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["research", "reads", "--model", str(tmp_path), "--n", "1"]) == 2
    assert "type 'linear'" in capsys.readouterr().err
