"""The README is short, and each of its commands is run by a test or by a target that CI runs."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.docs.commands import commands, made_by_ci, served
from tests.docs.markdown import ROOT
from tests.docs.test_promises import missing
from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.benchmarks.quality.cache_bytes import kept_tokens
from vllm_sparq.config import parse_options
from vllm_sparq.reads import HeadShape

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_WORDS = 900

SERVED = "tests/docs/test_readme.py::test_servers_of_the_readme_run_our_attention"
PROVEN_BY = {
    "make demo": "tests/benchmarks/serving/test_demo.py::test_a_real_run_answers_and_leaves_nothing",
    "make test": "tests/docs/test_readme.py::test_ci_runs_what_the_readme_names",
    "pip install .": "tests/test_packaging.py::test_wheel_holds_every_module",
    "pip install --no-deps ./packaging/vllm_cpu_name .": "tests/docs/test_readme.py::test_make_installs_so_too",
    "vllm-sparq doctor": "tests/test_doctor.py::test_a_real_engine_runs_our_class_in_a_spawned_worker",
    "vllm-sparq doctor --model MODEL": "tests/test_doctor.py::test_what_options_mean_for_a_model",
    "vllm-sparq eval --model MODEL --methods sparq,int4,h2o": (
        "tests/benchmarks/quality/test_engine.py::test_methods_tell_and_forcing_is_right"
    ),
}
"""Command -> the test that runs it; those of `vllm serve` are run by `SERVED`, taken from the README itself."""


def of_the_readme() -> set[str]:
    return set(commands(README))


def serving() -> list[str]:
    return sorted(command for command in of_the_readme() if command.startswith("vllm serve "))


def test_it_is_read_in_minutes() -> None:
    assert len(README.split()) <= MAX_WORDS


def test_every_command_is_run_by_a_test() -> None:
    assert of_the_readme() - set(serving()) == set(PROVEN_BY)
    assert not missing(" ".join(f"`{test}`" for test in (*PROVEN_BY.values(), SERVED)))


def targets_of_test(makefile: str) -> set[str]:
    """What `make test` makes: its prerequisites, and what its recipe calls make for."""
    rule = re.search(r"^test:([^#\n]*).*\n((?:\t.*\n)+)", makefile, flags=re.M)
    assert rule
    called = re.findall(r"\$\(MAKE\)((?: +[\w-]+)+)", rule.group(2))
    words = [*rule.group(1).split(), *" ".join(called).split()]
    return {word for word in words if not word.startswith("-")}


def test_ci_runs_what_the_readme_names() -> None:
    """`make test` is lint, types and every test; the workflow runs these targets, at every push."""
    needs = targets_of_test((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert needs == {"lint", "types", "unit"}
    assert needs <= {word for command in made_by_ci("push") for word in command.split()}


def test_make_installs_so_too() -> None:
    installs = re.findall(r"pip install (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert any("--no-deps" in line and "./packaging/vllm_cpu_name" in line for line in installs)
    assert any("--no-deps" in line and re.search(r" \.( |$)", line) for line in installs)


def test_python_takes_what_the_readme_shows() -> None:
    """`LLM(...)` with our options, as a call whose arguments Python can read."""
    call = re.search(r"`LLM\(MODEL, ([^`]*)\)`", README)
    assert call
    given = eval(f"dict({call.group(1)})", {"dict": dict})
    assert given == {"attention_backend": "sparq", "additional_config": {"sparq": {"compression": 4}}}


N_PROMPT = 1500
"""Tokens of a prompt that the README's commands rank, quantize or evict; shorter ones they read and keep in full."""


@pytest.mark.parametrize("command", serving())
def test_what_its_servers_do_is_done_to_a_prompt_of_that_length(command: str) -> None:
    backend, given = served(command)
    options = parse_options({"sparq": given}, backend)
    read = PagedEngine(backend=backend, options=options, block_size=128).read(
        HeadShape(head_size=64, n_heads=8, n_kv_heads=2)
    )
    assert options.format != "model" or not read.is_dense(N_PROMPT) or kept_tokens(options, N_PROMPT) < N_PROMPT


@pytest.mark.engine
@pytest.mark.parametrize("command", serving())
def test_servers_of_the_readme_run_our_attention(command: str) -> None:
    """The same engine in this process, on the bundled model: our class attends, and it answers."""
    from tests.engine.conftest import running_engine
    from tests.engine.support import Prompts

    backend, options = served(command)
    with running_engine(backend, options) as llm:
        report: dict[str, Any] = llm.collective_rpc("attention_report")[0]
        assert {layer["backend"] for layer in report.values()} == {backend.upper()}
        assert len(Prompts.answers(llm, [[5 + i % 997 for i in range(N_PROMPT)]], n_tokens=4)[0]) == 4
