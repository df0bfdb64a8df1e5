"""Workers for tests of `EngineProcess`, found by their names in another process."""

from __future__ import annotations

import os
from typing import Any


class Toy:
    """Takes orders as an engine does, in no time."""

    def __init__(self, greeting: str = "") -> None:
        if greeting == "refuse":
            raise ValueError("1 validation error\n  Value error, greeting is refused [type=value_error]")
        print(f"hello {greeting}", flush=True)

    def add(self, a: int, b: int) -> int:
        return a + b

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def fail(self) -> None:
        raise RuntimeError("the first line\nthe second")

    def vanish(self) -> None:
        print("the last word", flush=True)
        os._exit(3)

    def spin(self) -> Any:
        """At 100%, without ever looking at its pipe, as an engine in the middle of its work."""
        while True:
            pass
