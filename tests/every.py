"""`pytest -p tests.every --every N`: of each test's cases one in N, where a case takes seconds (`make arm`)."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="of each test's cases the first, and one in N")


@pytest.hookimpl(trylast=True)  # of what -k and -m leave: cases often take turns, such as cpu and triton
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen, kept, left = Counter[str](), [], []
    for item in items:
        name = item.nodeid.split("[")[0]
        (left if seen[name] % config.getoption("--every") else kept).append(item)
        seen[name] += 1
    items[:] = kept
    if left:
        config.hook.pytest_deselected(items=left)
