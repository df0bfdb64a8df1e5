"""A GGUF file and the folder made of it are one model: of tiny files that the tests write themselves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from vllm_sparq.console import UsageError

pytest.importorskip("gguf", reason="the package gguf is not installed")

from tests.models import files
from vllm_sparq.models import convert as conversion
from vllm_sparq.models.convert import convert


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model, and the folder of its file."""
    folder = tmp_path_factory.mktemp("llama")
    model = files.tiny_llama()
    files.write_llama(model, folder / "tiny.gguf")
    convert(folder / "tiny.gguf", folder / "tiny", opens_with_token=False, licence=files.LICENCE)
    return model, folder / "tiny"


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("gemma3")
    model = files.tiny_gemma3()
    files.write_gemma3(model, folder / "tiny.gguf")
    convert(folder / "tiny.gguf", folder / "tiny", opens_with_token=True)
    return model, folder / "tiny"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 40)[None]).logits
    return found


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_folder_is_the_file_s_model(kind: str, request: pytest.FixtureRequest) -> None:
    model, folder = request.getfixturevalue(kind)
    torch.testing.assert_close(logits(loaded(folder)), logits(model), rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tiny", "tiny.gguf"]


def test_two_at_once_make_one_whole_folder(
    llama: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins when the first has its weights, and waits before its own until the first is done."""
    file, folder = llama[1].with_name("tiny.gguf"), tmp_path / "tiny"
    write, began, go_on = conversion._write_weights, Event(), Event()
    pool = ThreadPoolExecutor(1)
    second: list[Any] = []

    def interleaved(*arguments: Any) -> int:
        if second:
            began.set()
            assert go_on.wait(60)
            return write(*arguments)
        n_rows = write(*arguments)
        second.append(pool.submit(convert, file, folder, opens_with_token=False))
        assert began.wait(60)
        return n_rows

    monkeypatch.setattr(conversion, "_write_weights", interleaved)
    try:
        convert(file, folder, opens_with_token=False)
        torch.testing.assert_close(logits(loaded(folder)), logits(llama[0]), rtol=1e-5, atol=1e-5)
        first = {path: path.stat().st_ino for path in folder.iterdir()}
    finally:
        go_on.set()
        pool.shutdown()
    second[0].result()
    assert {path: path.stat().st_ino for path in folder.iterdir()} == first  # whoever reads them goes on
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_is_for_who_may_read_others(llama: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    convert(llama[1].with_name("tiny.gguf"), tmp_path / "tiny", opens_with_token=False)
    assert (tmp_path / "tiny").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_a_killed_run_left_goes_with_the_next(llama: tuple[Any, Path], tmp_path: Path) -> None:
    file, folder = llama[1].with_name("tiny.gguf"), tmp_path / "tiny"
    code = f"""if True:
        import os, pathlib
        from vllm_sparq.models import convert as conversion
        conversion._write_weights = lambda *_: os.kill(os.getpid(), {signal.SIGKILL:d})
        conversion.convert(pathlib.Path({str(file)!r}), pathlib.Path({str(folder)!r}), opens_with_token=False)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    assert not folder.exists()
    convert(file, folder, opens_with_token=False)
    assert list(tmp_path.iterdir()) == [folder]


def test_quantized_weights_are_dequantized(llama: tuple[Any, Path], tmp_path: Path) -> None:
    import gguf

    weight = torch.randn(64, 96).numpy()
    packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
    found = torch.tensor(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_1))
    assert 0 < (found - torch.tensor(weight)).abs().max() < 0.3
    model, _ = llama
    name = "model.layers.1.mlp.down_proj.weight"
    state = model.state_dict()
    file = tmp_path / "quantized.gguf"
    with pytest.MonkeyPatch.context() as patch:
        add = gguf.GGUFWriter.add_tensor

        def add_quantized(self: Any, name: str, tensor: Any) -> None:
            if name == "blk.1.ffn_down.weight":
                add(self, name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            else:
                add(self, name, tensor)

        patch.setattr(gguf.GGUFWriter, "add_tensor", add_quantized)
        files.write_llama(model, file)
    convert(file, tmp_path / "quantized", opens_with_token=False)
    torch.testing.assert_close(loaded(tmp_path / "quantized").state_dict()[name], found.bfloat16().float())
    assert not torch.equal(found, state[name])


def test_the_tokenizer_of_the_file(llama: tuple[Any, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama[1])
    assert tokenizer("the").input_ids == [files.TOKENS.index("the")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "<s>the</s>"


def test_an_opening_token_is_put_first(gemma3: tuple[Any, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma3[1])
    assert tokenizer("the").input_ids == [2, files.PIECES.index("the")]
    assert tokenizer("the", add_special_tokens=False).input_ids == [files.PIECES.index("the")]


def test_sliding_layers_are_told_from_full_ones(gemma3: tuple[Any, Path]) -> None:
    config = json.loads((gemma3[1] / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]


def test_what_is_no_model_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF, it says")
    with pytest.raises(UsageError, match="is no GGUF file"):
        convert(file, tmp_path / "tiny", opens_with_token=False)
    files.write_llama(files.tiny_llama(), file, licence="unknown")
    with pytest.raises(UsageError, match=r"says licence 'unknown', and 'apache-2.0' was expected"):
        convert(file, tmp_path / "tiny", opens_with_token=False, licence="apache-2.0")
    files.write_llama(files.tiny_llama(), file, kind="mamba")
    with pytest.raises(UsageError, match=r"architecture 'mamba'; there are llama, gemma3"):
        convert(file, tmp_path / "tiny", opens_with_token=False)
    assert not list(tmp_path.glob("tiny*/"))
