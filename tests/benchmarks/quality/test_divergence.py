"""KL divergence from dense: against its definition, through the logits processor, and through real engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality import divergence as measure
from vllm_sparq.benchmarks.quality.cells import cells
from vllm_sparq.benchmarks.quality.engine import Engine, Run
from vllm_sparq.benchmarks.quality.forced import FORCED, RECORDED, ForcedTokens
from vllm_sparq.benchmarks.quality.prompts import Wanted
from vllm_sparq.benchmarks.tiny_model import WEIGHTS


def whole(p: torch.Tensor, q: torch.Tensor) -> float:
    """By the definition, over the whole vocabulary."""
    log_p, log_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    return float((log_p.exp() * (log_p - log_q)).sum())


def logits(n: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_of_a_small_vocabulary_it_is_the_definition() -> None:
    p, q = logits(300, 0), logits(300, 1)
    kl, changed = measure.divergence(q, *measure.likeliest(p))
    assert kl == pytest.approx(whole(p, q), rel=1e-5)
    assert changed == (int(p.argmax()) != int(q.argmax()))


def test_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    kl, changed = measure.divergence(q, *measure.likeliest(p))
    assert kl == pytest.approx(0.25 * np.log(2), rel=1e-6)
    assert changed


def test_the_rest_counts_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary it is at most the definition's, and misses little of it."""
    monkeypatch.setattr(measure, "N_LIKELIEST", 256)
    p = logits(20_000, 2)
    q = p + 0.3 * torch.randn(20_000, generator=torch.Generator().manual_seed(3))
    kl, _ = measure.divergence(q, *measure.likeliest(p))
    assert 0.75 * whole(p, q) < kl <= whole(p, q)
    assert measure.divergence(p, *measure.likeliest(p)) == (pytest.approx(0, abs=1e-6), False)


def test_recordings_survive_a_preemption(tmp_path: Path) -> None:
    """The request is taken out of the batch and comes back: its recording goes on."""
    processor = ForcedTokens(None, torch.device("cpu"), False)
    kept, found = tmp_path / "dense.npz", tmp_path / "mine.npz"
    for asked, shift in ({"to": str(kept)}, 0.0), ({"to": str(found), "dense": str(kept)}, 0.5):
        params = SimpleNamespace(extra_args={FORCED: [3, 1, 2], RECORDED: asked})
        said: list[int] = []
        for i, token in enumerate((3, 1, 2)):
            added = [(0, params, [], said)] if i in (0, 2) else []
            processor.update_state(SimpleNamespace(added=added, removed=[], moved=[]))  # type: ignore[arg-type]
            processor.apply(logits(9, 10 + i)[None] + shift * logits(9, 20)[None])
            said.append(token)
    kl, n_changed = measure.read_divergence(found)
    wanted = [whole(logits(9, 10 + i), logits(9, 10 + i) + 0.5 * logits(9, 20)) for i in range(3)]
    assert kl == pytest.approx(wanted, rel=1e-4)
    assert 0 <= n_changed <= 3
    assert processor.recordings == {}


def test_cells_hold_mean_tail_and_changes() -> None:
    def line(method: str, seed: int, **more: Any) -> dict[str, Any]:
        about = dict(task="text", length=9, method=method, metric="bits_per_byte", prompt_sha=str(seed), n_cut_tokens=0)
        return {**about, "score": 1.0, "output_tokens": 2, "prompt_tokens": 5, **more}

    lines = [line("dense", i) for i in range(2)]
    lines += [line("int4", i, divergence=[0.1, 0.3 + i], n_changed=i) for i in range(2)]
    dense, int4 = cells(lines)
    assert "kl" not in dense
    assert int4["kl"] == pytest.approx(0.45)
    assert int4["changed"] == 25
    assert int4["kl_low"] <= int4["kl"] <= int4["kl_high"] < int4["kl_p99"] < 1.3


@pytest.mark.engine
def test_reading_everything_diverges_by_nothing(tmp_path: Path) -> None:
    """Through engines, in float32: our dense read is vLLM's attention, two bits are not."""
    run = Run(model=WEIGHTS, dtype="float32", engine_args={"kv_cache_memory_bytes": 1 << 28})
    examples = Wanted(model=WEIGHTS, tasks=["text"], lengths=[600], n=2).examples(4096)
    found = {}
    for name in ("dense", "model", "kivi2"):
        with Engine(Method.named(name), run) as engine:
            found[name] = engine.answer(examples, tmp_path)
    assert all(output.divergence is None for output in found["dense"])
    for mine, dense in zip(found["model"], found["dense"], strict=True):
        assert mine.divergence is not None
        assert len(mine.divergence) == mine.n_tokens == 150
        assert max(mine.divergence) < 1e-4
        assert mine.n_changed == 0
        assert mine.nats == pytest.approx(dense.nats, rel=1e-4)
    assert all(np.mean(output.divergence or ()) > 1e-2 and output.n_changed for output in found["kivi2"])
