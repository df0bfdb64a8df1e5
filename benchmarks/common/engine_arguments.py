"""Arguments of vLLM's that a user gives beside those that a command sets itself: nobody sets one twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from vllm_sparq.console import UsageError


def refuse(given: Iterable[str], ours: Mapping[str, str], option: str = "--engine-args") -> None:
    """Refuse names that a command sets itself: what is recorded would not be what runs, or vLLM is told twice.

    Args:
        given: names as the user wrote them, with dashes or underscores.
        ours: name with underscores -> the option of the command's that sets it; "" where none does.

    Raises:
        UsageError: the first of them.
    """
    for name in given:
        plain = name.lstrip("-").partition(".")[0].replace("-", "_")
        if plain in ours:
            instead = f"use {ours[plain]} instead" if ours[plain] else "leave it out"
            raise UsageError(f"{option}: {name!r} is set by this command itself: {instead}")


def words_given(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Name with dashes and value of each argument of a command line of vLLM's, as its parser understands them.

    A value stands behind ``=`` or is the next word; None where that is an argument of its own, or nothing.
    """
    for i, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, equals, value = word.partition("=")
        after = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else None
        yield name.replace("_", "-"), value if equals else after
