"""What the names of methods stand for."""

from __future__ import annotations

import pytest

from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.console import UsageError


def test_names_stand_for_backends_and_options() -> None:
    assert Method.named("dense").engine_args == {}
    assert Method.named("kivi").engine_args == {"attention_backend": "KIVI", "additional_config": {"sparq": {}}}
    int4 = Method.named("int4")
    assert (int4.backend, int4.options) == ("SPARQ", {"format": "int4", "read": "dense"})
    both = Method.named("sparq+int4", {"compression": 4.0})
    assert both.options == {"format": "int4", "read": "sparq", "compression": 4.0}
    assert both.ranks_tokens
    assert not int4.ranks_tokens
    assert not Method.named("dense").ranks_tokens
    quest, over = Method.named("quest"), Method.named("quest+kivi2", {"dense_layers": 0})
    assert (quest.backend, quest.options, quest.ranks_tokens) == ("QUEST", {}, False)
    assert (over.backend, over.options) == ("SPARQ", {"read": "spans", "dense_layers": 0, "format": "kivi2"})


def test_what_means_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'sparc'.*sparq"):
        Method.named("sparc")
    with pytest.raises(UsageError, match=r"'window' is a value of the option retention: name streaming, .* or add"):
        Method.named("sparq+window")
    with pytest.raises(UsageError, match=r"""'all' is a value .* retention: add --options '{"retention": "all"}' to"""):
        Method.named("all")
    with pytest.raises(UsageError, match=r"method 'sparq'.*compresion.*Did you mean"):
        Method.named("sparq", {"compresion": 4.0})
