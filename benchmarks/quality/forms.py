"""Other forms of an example: asked in a model's chat template, or its right answer forced upon the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tasks.metrics import LIKELIHOOD
from vllm_sparq.console import UsageError

CHAT = ("auto", "on", "off")
"""Values of ``--chat-template``: where the model has one, always, never."""

ASKING = ("needle", "recall", "needle_keys", "needle_values", "passkey", "qa")
"""Tasks that ask a question of a text; the others go on with one, which no template suits."""


def uses_chat(wanted: str, tokenizer: Any, tasks: Sequence[str]) -> bool:
    """Whether questions are asked in the model's chat template.

    Raises:
        UsageError: it is wanted, and the tokenizer has none, or no task asks anything.
    """
    if wanted == "on" and not tokenizer.chat_template:
        raise UsageError("--chat-template on: the tokenizer of this model has none, so leave it out or write off")
    if wanted == "on" and not any(task in ASKING for task in tasks):
        raise UsageError(f"--chat-template on: none of these tasks asks anything; {', '.join(ASKING)} do")
    return wanted != "off" and bool(tokenizer.chat_template)


def chat_text(prompt: str, tokenizer: Any) -> str:
    """A prompt as a user's message, but for its last line, with which the model's answer begins."""
    asked, _, begun = prompt.rpartition("\n")
    message = [{"role": "user", "content": asked}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)) + begun


def chat_overhead(tokenizer: Any) -> int:
    """Tokens that the template adds to a prompt, at most."""
    whole = tokenizer(chat_text("a\nb", tokenizer), add_special_tokens=False).input_ids
    return len(whole) - len(tokenizer("a\nb").input_ids) + 2  # pieces may join otherwise at either end


def in_chat(example: Example, tokenizer: Any) -> Example:
    """The example asked in the chat template, with the answer begun as its last line has it."""
    text = chat_text(example.prompt, tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return replace(example, prompt=text, prompt_ids=tuple(ids), n_prompt_tokens=len(ids))


def forced(example: Example, tokenizer: Any) -> Example:
    """The example with its right answer forced: a score of 100 separates nothing, its likelihood does."""
    prompt = list(example.prompt_ids) or tokenizer(example.prompt, verbose=False).input_ids
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    if not example.prompt_ids:
        whole = tokenizer(example.prompt + example.answer, verbose=False).input_ids
        if whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]
    return replace(
        example, prompt_ids=tuple(prompt), answer_ids=tuple(answer), max_tokens=len(answer), metric=LIKELIHOOD
    )
