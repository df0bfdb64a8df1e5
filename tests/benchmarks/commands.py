"""Running the command line in a test."""

from __future__ import annotations

from vllm_sparq.cli import main


def exit_code(*words: str) -> int:
    """Of a command, whether its arguments or its work end it."""
    try:
        return main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
