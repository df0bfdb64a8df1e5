"""A text as a conversation: every token once, in turns of a prompt and an answer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.quality.conversation import turns_of
from vllm_sparq.benchmarks.tasks.generated import Example


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: Any) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_turns_by_hand() -> None:
    common = dict(task="text", n_prompt_tokens=1, depth=None, seed=0, max_tokens=11, stop=(), metric="bits_per_byte")
    window = Example(prompt="a", answer="bcdefghijkl", prompt_ids=(0,), answer_ids=tuple(range(1, 12)), **common)
    turns = turns_of(window, Letters(), 3)
    assert [(len(turn.prompt_ids), turn.answer) for turn in turns] == [(2, "cd"), (6, "gh"), (10, "kl")]
    for turn in turns:
        assert (*turn.prompt_ids, *turn.answer_ids) == tuple(range(len(turn.prompt_ids) + 2))
        assert turn.max_tokens == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "0"], "argument --n: '0' must be 1 or more"),
        (["--turns", "1"], "argument --turns: '1' must be 2 or more"),
        (["--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        (["--length", "7"], "--length 7: 4 turns need a prompt and an answer each, and the model has 4096 positions"),
        (["--length", "5000"], "--length 5000: 4 turns need a prompt and an answer each"),
        (["--block-size", "33"], "--block-size 33 cannot be cut into pages: give a multiple of"),
        (["--methods", "sparrow"], "unknown method 'sparrow'"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("research", "conversation", *words) == 2
    assert message in capsys.readouterr().err
