"""Generated tasks: needle, recall, repetition and map, of any length and for any tokenizer. Standard library only.

Every example is drawn from a seed and fitted to a length in tokens with the caller's `count_tokens`. The haystack is
written by a small grammar, so no corpus is needed at run time. Prompts end without a space; the answer begins with
one, so that prompt + answer tokenises into the tokens of the prompt followed by those of the answer.

The bundled model (`tiny_model`) trains on the same templates with `held_out=False`. The tasks draw names, keys and
values with `held_out=True`, from a disjoint eighth of the pseudo-words and numbers; passages to repeat mix all words,
since an eighth of them alone would repeat itself.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_sparq.benchmarks.tasks.metrics import METRICS

CountTokens = Callable[[str], int]

N_RECALL_FACTS = 16
N_CUE_WORDS = 12  # of a passage, shown again before the model has to go on
N_REFERENCE_WORDS = 20  # it is then scored on
HELD_OUT_EVERY = 8

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"


def words_of(text: str) -> tuple[str, ...]:
    """A word list written as one text."""
    return tuple(text.split())


SUBJECTS = words_of(
    "baker carpenter captain doctor farmer gardener judge lawyer merchant miller painter pilot poet sailor shepherd "
    "soldier student tailor teacher traveller watchman weaver widow writer fisherman clerk nurse neighbour singer"
)
ADJECTIVES = words_of(
    "old young quiet careful tired cheerful honest clever patient proud gentle nervous famous lonely busy stubborn "
    "heavy broken silver wooden narrow bright dusty golden frozen hidden empty simple crooked useful warm pale"
)
OBJECTS = words_of(
    "basket letter lantern bridge wagon ladder mirror blanket barrel curtain hammer kettle needle pillow rope table "
    "window wheel violin map ticket bottle candle coat drum engine flag glove picture stone umbrella chair"
)
VERBS = words_of(
    "carried repaired painted found lost sold bought borrowed described cleaned hid measured moved opened polished "
    "forgot remembered noticed returned examined admired collected dropped followed"
)
PLACES = words_of(
    "harbour market mountain river garden station library forest valley kitchen village castle church school field "
    "theatre museum island tower mill orchard cellar road square"
)
TIMES = (
    "in the morning",
    "before dinner",
    "after the storm",
    "last winter",
    "every summer",
    "at midnight",
    "on Sunday",
    "during the war",
    "without a word",
    "for many years",
    "in the rain",
    "with great care",
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and the text that should follow it.

    Greedy decoding of `max_tokens` tokens, ended early by any string in `stop`, is enough to score it. Where
    `answer_ids` are given, the answer is not generated but forced upon the model, token by token, and measured.
    """

    task: str
    prompt: str
    answer: str  # begins with a space
    n_prompt_tokens: int  # as counted by the caller's count_tokens
    depth: float | None  # where the answer lies in the context: 0.0 its start, 1.0 its end
    seed: int
    max_tokens: int
    stop: tuple[str, ...]
    metric: str = "begins"  # a name of `metrics.METRICS` or `metrics.MEASURED`
    answers: tuple[str, ...] = ()  # all that count, where there are more than `answer`
    choices: tuple[str, ...] = ()  # what there was to choose from, where the metric asks
    prompt_ids: tuple[int, ...] = ()  # the prompt in tokens, where they decide and not its text
    answer_ids: tuple[int, ...] = ()
    length: int | None = None  # tokens asked for, of generated tasks: what results are grouped by
    n_cut_tokens: int = 0  # taken out of the middle of the prompt, as the task's definition has it

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every answer that the metric is given."""
        return self.answers or (self.answer,)


def is_held_out(text: str) -> bool:
    """Whether a pseudo-word or number belongs to the tasks (True) or to training rows (False)."""
    return zlib.crc32(text.encode()) % HELD_OUT_EVERY == 0


def new_word(rng: random.Random, *, held_out: bool | None) -> str:
    """A pseudo-word of two or three consonant-vowel syllables, such as "balu" or "tirone"; None: of either kind."""
    while True:
        n_syllables = rng.choice((2, 2, 3))
        word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(n_syllables))
        if held_out is None or is_held_out(word) == held_out:
            return word


def new_words(rng: random.Random, n: int, *, held_out: bool) -> list[str]:
    """`n` different pseudo-words."""
    words: dict[str, None] = {}
    while len(words) < n:
        words[new_word(rng, held_out=held_out)] = None
    return list(words)


def new_number(rng: random.Random, *, held_out: bool) -> str:
    """A number of five digits that does not begin with 0."""
    while True:
        number = str(rng.randint(10000, 99999))
        if is_held_out(number) == held_out:
            return number


def question(name: str) -> str:
    """The beginning of a fact, up to where the value has to follow."""
    return f"The key of {name} is"


def fact(name: str, value: str) -> str:
    """A sentence that gives `name` the value `value`."""
    return f"{question(name)} {value}."


def map_question(key: str) -> str:
    """The beginning of a line of a map, up to where the value has to follow."""
    return f"{key} ->"


def map_line(key: str, value: str) -> str:
    """A line of a map, without its newline."""
    return f"{map_question(key)} {value}"


def sentence(rng: random.Random) -> str:
    """A sentence of the haystack, such as "The old miller hid a silver lantern near the river last winter."."""

    def noun(words: Sequence[str]) -> str:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(words)}" if rng.random() < 0.5 else rng.choice(words)

    parts = [f"The {noun(SUBJECTS)} {rng.choice(VERBS)} the {noun(OBJECTS)}"]
    if rng.random() < 0.6:
        parts.append(f"{rng.choice(('near', 'behind', 'in', 'outside'))} the {noun(PLACES)}")
    if rng.random() < 0.3:
        parts.append(f"and {rng.choice(VERBS)} the {noun(OBJECTS)}")
    if rng.random() < 0.4:
        parts.append(rng.choice(TIMES))
    return " ".join(parts) + "."


def passage_sentence(rng: random.Random, *, held_out: bool | None) -> list[str]:
    """The words of a sentence of four to ten pseudo-words."""
    words = [new_word(rng, held_out=held_out) for _ in range(rng.randint(4, 10))]
    return [words[0].capitalize(), *words[1:-1], words[-1] + "."]


class Haystack:
    """An endless text from one seed; a shorter text is always the beginning of a longer one.

    Args:
        rng: decides the text, or where it begins.
        given: sentences of the caller's own, taken in order and round and round; None to write some.
    """

    def __init__(self, rng: random.Random, given: Sequence[str] | None = None) -> None:
        self.rng = rng
        self.sentences: list[list[str]] = []
        self.n_words = 0
        start = rng.randrange(len(given)) if given else 0
        self.given = itertools.cycle([*given[start:], *given[:start]]) if given else None

    def take(self, n_words: int) -> list[str]:
        """Sentences with `n_words` words in total, the last one cut short where need be."""
        while self.n_words < n_words:
            written = sentence(self.rng) if self.given is None else next(self.given)
            self.sentences.append(written.split())
            self.n_words += len(self.sentences[-1])
        taken: list[str] = []
        left = n_words
        for words in self.sentences:
            if left <= 0:
                break
            cut = words[:left]
            text = " ".join(cut)
            taken.append(text if text[-1] in ".!?" else text.rstrip(",;:") + ".")
            left -= len(cut)
        return taken


def fit(build: Callable[[int], str], n_tokens: int, count_tokens: CountTokens, n_units_min: int) -> int:
    """The largest number of units for which `build(units)` has at most `n_tokens` tokens.

    `build` must not get shorter with more units. The prompt falls short of `n_tokens` by less than one unit.
    """
    shortest = count_tokens(build(n_units_min))
    if shortest > n_tokens:
        raise ValueError(f"n_tokens={n_tokens} is too short for this task: its shortest prompt has {shortest} tokens")
    low, high = n_units_min, n_units_min + 16
    while count_tokens(build(high)) <= n_tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_tokens(build(middle)) <= n_tokens else (low, middle)
    return low


def place(n: int, depth: float) -> int:
    """The place among 0..n that lies at `depth` (0.0 to 1.0)."""
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie between 0.0 and 1.0, got {depth}")
    return round(depth * n)


def needle(
    *,
    n_tokens: int,
    count_tokens: CountTokens,
    seed: int,
    depth: float | None = None,
    given: Sequence[str] | None = None,
) -> Example:
    """One fact at `depth` (drawn when None) of a haystack; the prompt ends by asking for it."""
    rng = random.Random(f"needle {seed}")
    depth = rng.random() if depth is None else depth
    name, value = new_word(rng, held_out=True), new_number(rng, held_out=True)
    hay = Haystack(rng, given)

    def build(n_words: int) -> str:
        text = hay.take(n_words)
        text.insert(place(len(text), depth), fact(name, value))
        return " ".join(text) + "\n" + question(name)

    prompt = build(fit(build, n_tokens, count_tokens, 0))
    return finish("needle", prompt, f" {value}", depth, seed, count_tokens, stop=(".", "\n"))


def recall(
    *,
    n_tokens: int,
    count_tokens: CountTokens,
    seed: int,
    depth: float | None = None,
    given: Sequence[str] | None = None,
) -> Example:
    """Sixteen facts spread over a haystack; the prompt ends by asking for the one nearest to `depth`."""
    rng = random.Random(f"recall {seed}")
    depth = rng.random() if depth is None else depth
    names = new_words(rng, N_RECALL_FACTS, held_out=True)
    values = [new_number(rng, held_out=True) for _ in names]
    places = sorted(rng.random() for _ in names)
    asked = place(N_RECALL_FACTS - 1, depth)
    hay = Haystack(rng, given)

    def build(n_words: int) -> str:
        text = hay.take(n_words)
        n_sentences = len(text)
        for i in reversed(range(N_RECALL_FACTS)):
            text.insert(place(n_sentences, places[i]), fact(names[i], values[i]))
        return " ".join(text) + "\n" + question(names[asked])

    prompt = build(fit(build, n_tokens, count_tokens, 0))
    return finish("recall", prompt, f" {values[asked]}", depth, seed, count_tokens, stop=(".", "\n"))


def repetition(*, n_tokens: int, count_tokens: CountTokens, seed: int, depth: float | None = None) -> Example:
    """A passage of pseudo-words, then a piece of it again, beginning at `depth`: the model has to go on with it."""
    rng = random.Random(f"repetition {seed}")
    depth = rng.random() if depth is None else depth
    n_piece = N_CUE_WORDS + N_REFERENCE_WORDS
    words: list[str] = []

    def build(n_words: int) -> str:
        while len(words) < n_words:
            words.extend(passage_sentence(rng, held_out=None))
        start = place(n_words - n_piece, depth)
        return " ".join(words[:n_words]) + "\n" + " ".join(words[start : start + N_CUE_WORDS])

    n_words = fit(build, n_tokens, count_tokens, n_piece)
    start = place(n_words - n_piece, depth) + N_CUE_WORDS
    answer = " " + " ".join(words[start : start + N_REFERENCE_WORDS])
    example = finish("repetition", build(n_words), answer, depth, seed, count_tokens, stop=("\n",))
    return replace(example, metric="prefix")


def in_context_map(*, n_tokens: int, count_tokens: CountTokens, seed: int, depth: float | None = None) -> Example:
    """Lines "key -> value" of pseudo-words, every key once; the prompt ends with the key nearest to `depth`."""
    rng = random.Random(f"map {seed}")
    depth = rng.random() if depth is None else depth
    pairs: dict[str, str] = {}

    def build(n_pairs: int) -> str:
        while len(pairs) < n_pairs:
            pairs.setdefault(new_word(rng, held_out=True), new_word(rng, held_out=True))
        shown = list(pairs.items())[:n_pairs]
        lines = [map_line(key, value) for key, value in shown]
        return "\n".join([*lines, map_question(shown[place(n_pairs - 1, depth)][0])])

    n_pairs = fit(build, n_tokens, count_tokens, 1)
    answer = list(pairs.values())[place(n_pairs - 1, depth)]
    return finish("map", build(n_pairs), f" {answer}", depth, seed, count_tokens, stop=("\n",))


def finish(
    task: str, prompt: str, answer: str, depth: float, seed: int, count_tokens: CountTokens, *, stop: tuple[str, ...]
) -> Example:
    """The example with its lengths counted; a few tokens beyond the answer leave room for other tokenisations."""
    return Example(
        task=task,
        prompt=prompt,
        answer=answer,
        n_prompt_tokens=count_tokens(prompt),
        depth=depth,
        seed=seed,
        max_tokens=count_tokens(answer) + 4,
        stop=stop,
    )


TASKS: dict[str, Callable[..., Example]] = {
    "needle": needle,
    "recall": recall,
    "repetition": repetition,
    "map": in_context_map,
}


def make_example(
    task: str, *, n_tokens: int, count_tokens: CountTokens, seed: int, depth: float | None = None
) -> Example:
    """The example of `task` with this seed: at most `n_tokens` prompt tokens, and at most some ten fewer."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there are {list(TASKS)}")
    return TASKS[task](n_tokens=n_tokens, count_tokens=count_tokens, seed=seed, depth=depth)


def make_examples(
    task: str, n: int, *, n_tokens: int, count_tokens: CountTokens, seed: int = 0, depth: float | None = None
) -> Iterator[Example]:
    """`n` examples with seeds `seed`, `seed + 1`, ...; depths are drawn from the seeds unless one is given."""
    for i in range(n):
        yield make_example(task, n_tokens=n_tokens, count_tokens=count_tokens, seed=seed + i, depth=depth)


def score(example: Example, output: str) -> float:
    """Between 0.0 and 1.0, by the example's metric."""
    return METRICS[example.metric](output, example.accepted, example.choices)
