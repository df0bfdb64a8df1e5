"""An engine of which no layer runs on the backend that was selected does not start, and doctor says so before."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.architectures.configurations import REFUSED, STATES, Model
from tests.engine.support import MODEL

pytestmark = pytest.mark.engine

SMALL: dict[str, Any] = dict(
    max_model_len=256, kv_cache_memory_bytes=8 << 20, max_num_batched_tokens=256, load_format="dummy"
)
WINDOWS = dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=64)
"""Mistral 7B v0.1: a window in every layer, and no list of layers that would say so."""


@pytest.fixture(autouse=True)
def _no_groups_of_others() -> Iterator[None]:
    """An engine that does not start leaves its process groups, which lack what the next one's model asks for."""
    from vllm.distributed import cleanup_dist_env_and_memory

    yield
    cleanup_dist_env_and_memory()


def folder_of(folder: Path, **changes: Any) -> Path:
    """The bundled model's configuration with some values changed, and its tokenizer."""
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(MODEL / name)
    return folder


def pin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of vLLM's may pin a backend, as those do whose K and V have different widths."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    build = Attention.__init__

    def pinned(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **{**kwargs, "attn_backend": CPUAttentionBackend})

    monkeypatch.setattr(Attention, "__init__", pinned)


@pytest.mark.parametrize("backend", ["sparq", "h2o"])
def test_windows_in_every_layer(backend: str, tmp_path: Path, engine: Any) -> None:
    message = rf"--attention-backend {backend} was selected, but no layer.* 4 on CPU_ATTN.*use vLLM's own backend"
    with (
        pytest.raises(ValueError, match=message),
        engine(backend, model=str(folder_of(tmp_path, **WINDOWS)), **SMALL),
    ):
        pass


def test_a_pinned_backend(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pin(monkeypatch)
    with (
        pytest.raises(ValueError, match=r"no layer.* 4 on CPU_ATTN.*pins a backend of its own"),
        engine("kivi", model=str(folder_of(tmp_path)), **SMALL),
    ):
        pass


def test_values_of_another_width(tmp_path: Path, engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """MiMo-V2: nobody needs to guess why its layers are not ours."""
    from vllm_sparq.cli import main

    folder = REFUSED["mimo-v2"].write(tmp_path)
    wrong = r"no layer.* 4 on \w+_DIFFKV \(heads of its V are not as wide as those of its K\).*use vLLM's own backend"
    with (
        pytest.raises(ValueError, match=wrong),
        engine("sparq", model=str(folder), skip_tokenizer_init=True, **SMALL),
    ):
        pass
    assert main(["doctor", "--quick", "--json", "--model", str(folder), "--attention-backend", "sparq"]) == 1
    assert re.search(wrong, capsys.readouterr().out)


@pytest.mark.parametrize("pinned", [False, True], ids=["windows", "pinned"])
def test_doctor_finds_it(
    pinned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_sparq.cli import main

    if pinned:
        pin(monkeypatch)
    folder = folder_of(tmp_path, **({} if pinned else WINDOWS))
    assert main(["doctor", "--quick", "--json", "--model", str(folder), "--attention-backend", "kivi"]) == 1
    sections = json.loads(capsys.readouterr().out)["sections"]
    (wrong,) = [line["text"] for section in sections for line in section["findings"] if line["mark"] == "✗"]
    assert wrong.startswith("refused: --attention-backend kivi was selected, but no layer of the model runs on it")


def test_doctor_counts_in_pages_and_in_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_sparq.cli import main

    one = STATES["granite-4"]
    folder = Model(one.architecture, {**one.config, "mamba_d_state": 128}).write(tmp_path)
    assert main(["doctor", "--quick", "--json", "--model", str(folder), "--attention-backend", "kivi"]) == 0
    (section,) = [s for s in json.loads(capsys.readouterr().out)["sections"] if s["title"].startswith("model")]
    texts = [line["text"] for line in section["findings"]]
    assert section["numbers"]["memory"]["block_size"] == 128
    assert section["numbers"]["backends"]["KIVI"] == section["numbers"]["shape"]["n_full"] == 1
    assert any("vLLM's own blocks hold" in text and "side by side" in text for text in texts)


def test_doctor_says_what_runs_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_sparq.cli import main

    kinds = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    folder = folder_of(
        tmp_path,
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        query_pre_attn_scalar=64,
        sliding_window=64,
        layer_types=kinds,
    )
    assert main(["doctor", "--quick", "--json", "--model", str(folder), "--attention-backend", "kivi"]) == 0
    (section,) = [s for s in json.loads(capsys.readouterr().out)["sections"] if s["title"].startswith("model")]
    assert section["numbers"]["backends"] == {"KIVI": 1, "CPU_ATTN": 3}
    assert any("3 layers on CPU_ATTN, 1 layers on KIVI" in line["text"] for line in section["findings"])
