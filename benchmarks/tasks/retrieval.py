"""More generated retrieval: several keys, several values, a passkey, questions about people. Any length, any tokenizer.

needle_keys    one fact among three others of the same form (RULER's multi-key needle); 1 in 4 by guessing
needle_values  one name with four values, all of which are asked for (RULER's multi-value needle)
passkey        a number announced twice in one place (Mohtashami and Jaggi 2023, as the benchmark paper asks for it)
quote          the beginning of a sentence of the text; it has to be gone on with, word by word
few_shot       names with their kind, line by line; the kind of one more
qa             who keeps what where, eight people; a question in words about one of them; 1 in 8 by guessing

They share the haystack, the words and the conventions of `tasks`. The bundled model was trained on none of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from vllm_sparq.benchmarks.tasks import generated as tasks
from vllm_sparq.benchmarks.tasks.generated import (
    CountTokens,
    Example,
    Haystack,
    fact,
    fit,
    new_number,
    new_words,
    place,
)

N_NEEDLE_KEYS = 4
N_NEEDLE_VALUES = 4
N_QA_PEOPLE = 8
N_QUOTED = 10  # words of a sentence that is quoted, at least
N_QUOTE_CUE = 6  # of which so many are shown again
N_QUOTE_MOST = 16  # and at most so many asked for
N_QUOTE_LEAST = 60  # words of a text that surely holds such a sentence

PASSKEY_TASK = "There is a pass key hidden in the text below. Find it and remember it.\n"


def hidden(
    facts: Sequence[str],
    places: Sequence[float],
    ending: str,
    *,
    n_tokens: int,
    count_tokens: CountTokens,
    hay: Haystack,
    beginning: str = "",
) -> str:
    """A haystack as long as fits, with each fact at its place (0.0 to 1.0), and what has to be gone on with."""

    def build(n_words: int) -> str:
        text = hay.take(n_words)
        n_sentences = len(text)
        for one, where in sorted(zip(facts, places, strict=True), key=lambda pair: pair[1], reverse=True):
            text.insert(place(n_sentences, where), one)
        return beginning + " ".join(text) + "\n" + ending

    return build(fit(build, n_tokens, count_tokens, 0))


def needle_keys(
    *,
    n_tokens: int,
    count_tokens: CountTokens,
    seed: int,
    depth: float | None = None,
    given: Sequence[str] | None = None,
) -> Example:
    """A fact at `depth`, three of other names anywhere; the prompt ends by asking for the first."""
    rng = random.Random(f"needle_keys {seed}")
    depth = rng.random() if depth is None else depth
    names = new_words(rng, N_NEEDLE_KEYS, held_out=True)
    values = [new_number(rng, held_out=True) for _ in names]
    places = [depth, *(rng.random() for _ in names[1:])]
    facts = [fact(name, value) for name, value in zip(names, values, strict=True)]
    ending = tasks.question(names[0])
    prompt = hidden(facts, places, ending, n_tokens=n_tokens, count_tokens=count_tokens, hay=Haystack(rng, given))
    return tasks.finish("needle_keys", prompt, f" {values[0]}", depth, seed, count_tokens, stop=(".", "\n"))


def needle_values(
    *,
    n_tokens: int,
    count_tokens: CountTokens,
    seed: int,
    depth: float | None = None,
    given: Sequence[str] | None = None,
) -> Example:
    """Four values of one name, the first at `depth`; the prompt asks for all of them."""
    rng = random.Random(f"needle_values {seed}")
    depth = rng.random() if depth is None else depth
    (name,) = new_words(rng, 1, held_out=True)
    values = [new_number(rng, held_out=True) for _ in range(N_NEEDLE_VALUES)]
    places = [depth, *(rng.random() for _ in values[1:])]
    facts = [f"One of the keys of {name} is {value}." for value in values]
    ending = f"The {N_NEEDLE_VALUES} keys of {name} are"
    prompt = hidden(facts, places, ending, n_tokens=n_tokens, count_tokens=count_tokens, hay=Haystack(rng, given))
    answer = " " + ", ".join(values)
    example = tasks.finish("needle_values", prompt, answer, depth, seed, count_tokens, stop=("\n",))
    return replace(example, metric="share", answers=tuple(values))


def passkey(
    *,
    n_tokens: int,
    count_tokens: CountTokens,
    seed: int,
    depth: float | None = None,
    given: Sequence[str] | None = None,
) -> Example:
    """A number, announced before and after it is told; the prompt says beforehand that it will be asked for."""
    rng = random.Random(f"passkey {seed}")
    depth = rng.random() if depth is None else depth
    value = new_number(rng, held_out=True)
    facts = [f"The pass key is {value}. Remember it. {value} is the pass key."]
    ending = "What is the pass key? The pass key is"
    prompt = hidden(
        facts,
        [depth],
        ending,
        n_tokens=n_tokens,
        count_tokens=count_tokens,
        hay=Haystack(rng, given),
        beginning=PASSKEY_TASK,
    )
    return tasks.finish("passkey", prompt, f" {value}", depth, seed, count_tokens, stop=(".", "\n"))


def extraction(
    *,
    n_tokens: int,
    count_tokens: CountTokens,
    seed: int,
    depth: float | None = None,
    given: Sequence[str] | None = None,
) -> Example:
    """Eight people keep eight things in eight places; the prompt ends with a question about the one at `depth`."""
    rng = random.Random(f"qa {seed}")
    depth = rng.random() if depth is None else depth
    names = [name.capitalize() for name in new_words(rng, N_QA_PEOPLE, held_out=True)]
    things = rng.sample(tasks.OBJECTS, N_QA_PEOPLE)
    where = rng.sample(tasks.PLACES, N_QA_PEOPLE)
    facts = [f"{who} keeps the {thing} in the {at}." for who, thing, at in zip(names, things, where, strict=True)]
    places = [depth, *(rng.random() for _ in names[1:])]
    ending = f"Question: Where does {names[0]} keep the {things[0]}?\nAnswer: In the"
    prompt = hidden(facts, places, ending, n_tokens=n_tokens, count_tokens=count_tokens, hay=Haystack(rng, given))
    return tasks.finish("qa", prompt, f" {where[0]}", depth, seed, count_tokens, stop=(".", "\n"))


def quote(
    *,
    n_tokens: int,
    count_tokens: CountTokens,
    seed: int,
    depth: float | None = None,
    given: Sequence[str] | None = None,
) -> Example:
    """A text, and the first words of its sentence at `depth` (or the next one that is long enough) once more."""
    rng = random.Random(f"quote {seed}")
    depth = rng.random() if depth is None else depth
    hay = Haystack(rng, given)

    def quoted(text: Sequence[str]) -> list[str]:
        first = place(len(text) - 1, depth)
        long = [words for words in map(str.split, [*text[first:], *reversed(text[:first])]) if len(words) >= N_QUOTED]
        if not long:
            raise ValueError(f"no sentence of the haystack has {N_QUOTED} words")
        return long[0]

    def build(n_words: int) -> str:
        text = hay.take(n_words)
        return " ".join(text) + '\nTo quote the text: "' + " ".join(quoted(text)[:N_QUOTE_CUE])

    n_words = fit(build, n_tokens, count_tokens, N_QUOTE_LEAST)
    rest = quoted(hay.take(n_words))[N_QUOTE_CUE : N_QUOTE_CUE + N_QUOTE_MOST]
    example = tasks.finish("quote", build(n_words), " " + " ".join(rest), depth, seed, count_tokens, stop=("\n",))
    return replace(example, metric="prefix")


def few_shot(*, n_tokens: int, count_tokens: CountTokens, seed: int, depth: float | None = None) -> Example:
    """Lines such as "old miller: person"; the prompt ends with a name whose kind the lines have shown."""
    rng = random.Random(f"few_shot {seed}")
    depth = rng.random() if depth is None else depth
    kinds = {"person": tasks.SUBJECTS, "thing": tasks.OBJECTS, "place": tasks.PLACES}
    lines: list[tuple[str, str]] = []

    def build(n_lines: int) -> str:
        while len(lines) < n_lines + 1:
            kind = rng.choice(list(kinds))
            lines.append((f"{rng.choice(tasks.ADJECTIVES)} {rng.choice(kinds[kind])}", kind))
        shown = [f"{name}: {kind}" for name, kind in lines[1 : n_lines + 1]]
        return "\n".join([*shown, f"{lines[0][0]}:"])

    prompt = build(fit(build, n_tokens, count_tokens, len(kinds)))
    example = tasks.finish("few_shot", prompt, f" {lines[0][1]}", depth, seed, count_tokens, stop=("\n",))
    return replace(example, choices=tuple(kinds))


RETRIEVAL: dict[str, Callable[..., Example]] = {
    "needle_keys": needle_keys,
    "needle_values": needle_values,
    "passkey": passkey,
    "qa": extraction,
    "quote": quote,
    "few_shot": few_shot,
}
"""Name -> how an example is made."""
