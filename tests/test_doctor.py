"""The doctor finds what is wrong, says what to do, and what the options mean for a model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from vllm_sparq import cli, compat
from vllm_sparq.attention_backends import capacity as capacity_module
from vllm_sparq.attention_backends import engine as paged_engine
from vllm_sparq.config import Options, parse_options
from vllm_sparq.doctor import command, machine
from vllm_sparq.doctor import engine as engine_check
from vllm_sparq.doctor.findings import Section
from vllm_sparq.doctor.model import model_section

LLAMA = {**engine_check.CONFIG, "max_position_embeddings": 8192, "num_hidden_layers": 3}


def model_folder(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    return str(folder)


def texts(section: Section, mark: str) -> str:
    return "\n".join(finding.text for finding in section.findings if finding.mark == mark)


def test_quick_check_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--quick", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [section["title"] for section in report["sections"]] == ["versions", "plugin", "device", "operations"]
    wrong = [f["text"] for section in report["sections"] for f in section["findings"] if f["mark"] == "✗"]
    assert (code, report["is_well"], wrong) == (0, True, [])
    device, operations = report["sections"][2:]
    assert device["numbers"]["platform"].startswith("vllm_sparq.platform.Sparq")
    assert set(operations["numbers"]) == {"write", "prefill", "dense_decode", "sparq_decode", "quest_decode", "evict"}


def test_for_people_it_ends_with_a_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: Version("0.31.1"))
    assert cli.main(["doctor", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "✗ vLLM 0.31.1 is not supported" in out
    assert "1 thing is wrong" in out
    assert "operations" not in out  # they need a vLLM that can be used


def test_the_verdict_has_the_options_that_were_asked_about_without_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm_sparq.doctor.command.checks", lambda *_: [])
    assert cli.main(["doctor", "--attention-backend", "h2o", "--options", '{"budget": 64}']) == 0
    command = """vllm serve ... --attention-backend h2o --additional-config '{"sparq": {"budget": 64}}'"""
    assert capsys.readouterr().out.rstrip().endswith(f"All is well: {command}")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--attention-backend", "h2o"], "give doctor's own --attention-backend instead"),
        (["--additional-config", '{"sparq": {"compression": 4}}'], "give what it says of sparq as --options instead"),
    ],
)
def test_arguments_that_decide_what_is_described_are_its_own(tmp_path: Path, words: list[str], remedy: str) -> None:
    """Else the figures are of other options than the command below them."""
    section = model_section(model_folder(tmp_path), Options(), serve_args=words)
    assert not section.is_well
    assert f"{words[0]} among --serve-args is not described: {remedy}" in texts(section, "✗")


def test_a_bypassed_platform_is_found() -> None:
    """And said even where the terminal knows nothing but ASCII."""
    code = "import sys; from vllm_sparq.cli import main; sys.exit(main(['doctor', '--quick', '--json']))"
    environment = os.environ | {"VLLM_TARGET_DEVICE": "cpu", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    wrong = [f["text"] for s in json.loads(done.stdout)["sections"] for f in s["findings"] if f["mark"] == "✗"]
    assert done.returncode == 1
    assert wrong[0].startswith("VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins")
    assert "not ours" in wrong[1]


@pytest.mark.parametrize(
    ("name", "value", "mark", "message"),
    [
        ("VLLM_PLUGINS", "other", "✗", "'other' switches vllm-sparq off: unset it"),
        ("VLLM_PLUGINS", "other,sparq", "✓", "names sparq"),
        ("VLLM_SPARQ_IMPL", "reference", "•", "VLLM_SPARQ_IMPL=reference overrides"),
    ],
)
def test_environment_variables(name: str, value: str, mark: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert message in texts(machine.environment(), mark)


def test_an_unknown_implementation_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SPARQ_IMPL", "cuda")
    assert "VLLM_SPARQ_IMPL='cuda' is not an implementation of write" in texts(machine.implementations(), "✗")


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> Section:
        raise RuntimeError("no such thing")

    assert texts(command.run_check(broken), "✗") == "RuntimeError: no such thing"


def test_what_options_mean_for_a_model(tmp_path: Path) -> None:
    section = model_section(model_folder(tmp_path), Options(compression=4.0, dense_below=2048))
    assert section.is_well
    assert section.numbers["shape"] == dict(n_layers=3, n_full=3, n_heads=4, n_kv_heads=2, head_size=64)
    # k = 7/32 S, a quarter of it the newest; one more for the current token
    assert section.numbers["contexts"] == [
        dict(context=1024, tokens_read=1024, k=256, local=64),
        dict(context=4096, tokens_read=897, k=896, local=224),
        dict(context=8192, tokens_read=1793, k=1792, local=448),
    ]
    memory = section.numbers["memory"]
    # bf16 K and V, an int4 copy of K, and per page of 128 tokens two fp16 per channel
    per_head = 2 * 64 * 2 + 64 // 2 + 64 * 2 * 2 // 128
    assert memory["bytes_per_token_and_kv_head"] == dict(sparq=per_head, dense=256)
    assert memory["bytes_per_token"] == dict(sparq=per_head * 2 * 3, dense=256 * 2 * 3)
    # vLLM's own count, in whole blocks of a cache that is cut into layers
    assert memory["tokens_per_gib"]["sparq"] == pytest.approx(2**30 // (per_head * 6), rel=0.01)
    assert memory["tokens_per_gib"]["dense"] == pytest.approx(2**30 // (256 * 6), rel=0.01)
    # int4 beside the copy: 32 bytes of codes and 4 of scales, twice; K of kivi2 ranks tokens itself
    assert section.numbers["formats"]["int4"] == 2 * (32 + 4) + 64 // 2 + 64 * 2 * 2 // 128
    assert section.numbers["formats"]["kivi2"] == 2 * (16 + 8)
    assert "r = 16 of 64 channels" in texts(section, "✓")
    assert "blocks of 128 tokens" in texts(section, "✓")
    assert "at   1,024 tokens a step reads all of them" in texts(section, "•")
    assert "at most --tensor-parallel-size 2: read='sparq' chooses tokens" in texts(section, "•")
    dense = model_section(model_folder(tmp_path), Options(read="dense", format="kivi4"), "kivi")
    assert "--tensor-parallel-size" not in texts(dense, "•")


def test_biases_in_keys_are_told_where_four_bits_hold_them_together(tmp_path: Path) -> None:
    """Qwen 2 adds a bias to K in every layer. By channel, or in 8 bits, nothing is lost by it."""
    qwen = model_folder(tmp_path, architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=256)
    for format, is_told in (("int4", True), ("k8v4", False), ("kivi4", False), ("model", False)):
        section = model_section(qwen, Options(read="dense", format=format), "flexgen")
        assert section.numbers["biased_keys"] == 3, section.findings
        assert ("add a bias to K" in texts(section, "•")) == is_told
    llama = tmp_path / "llama"
    llama.mkdir()
    section = model_section(model_folder(llama), Options(read="dense", format="int4"), "flexgen")
    assert section.numbers["biased_keys"] == 0
    assert "add a bias to K" not in texts(section, "•")


def test_what_a_mass_means_for_a_model(tmp_path: Path) -> None:
    section = model_section(model_folder(tmp_path), Options(compression=4.0, mass=0.95, local=16, min_k=32))
    # k = 7/32 S is the most, min_k and the current token the least.
    assert section.numbers["contexts"][1] == dict(context=4096, tokens_read=897, k=896, local=16, least_read=33)
    assert "reads as few as hold 0.95 of the estimated probability" in texts(section, "✓")
    assert "at   4,096 tokens a step reads 33 to 897: at least 1 in 124.1" in texts(section, "✓")


def test_what_reading_spans_means_for_a_model(tmp_path: Path) -> None:
    options = Options(read="spans", compression=4.0, dense_below=2048, dense_layers=2)
    section = model_section(model_folder(tmp_path), options)
    assert section.is_well
    # k = 3 S / 16: 768 of 4096 tokens are 48 spans, 1536 of 8192 are 96
    assert section.numbers["contexts"] == [
        dict(context=1024, tokens_read=1024, k=256, spans=16),
        dict(context=4096, tokens_read=768, k=768, spans=48),
        dict(context=8192, tokens_read=1536, k=1536, spans=96),
    ]
    # bf16 K and V, and a sixteenth of that
    assert section.numbers["memory"]["bytes_per_token_and_kv_head"] == dict(sparq=256 + 16, dense=256)
    assert "spans of 16 tokens, read as one" in texts(section, "✓")
    assert "48 spans, the newest among them" in texts(section, "✓")
    assert "first 2 layers always read densely" in texts(section, "•")


def test_what_eviction_means_for_a_model(tmp_path: Path) -> None:
    options = Options(retention="heavy_hitter", budget=1024, prefill="bounded", read="dense")
    section = model_section(model_folder(tmp_path), options)
    # 1,024 tokens are 8 blocks of 128; a prompt has a segment of 256 tokens more
    assert section.numbers["retention"] == dict(budget=1024, interval=1, blocks=dict(dense=64, answer=8, prompt=10))
    assert "of 8,192 tokens a request keeps 1,024 per KV head: the 512 newest and those" in texts(section, "✓")
    sparse = model_section(model_folder(tmp_path), options.model_copy(update={"read": "sparq", "dense_below": 0}))
    assert [row["context"] for row in sparse.numbers["contexts"]] == [1024]


def test_a_budget_is_told_in_blocks_of_their_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a block goes at a time, the least budget is two blocks, and small blocks are an engine's to have."""
    words = ["--attention-backend", "h2o", "--options", '{"budget":64,"format":"int4"}']
    arguments = ["doctor", "--quick", "--json", "--model", model_folder(tmp_path), *words]
    assert cli.main([*arguments, "--serve-args", '["--block-size","32"]']) == 0
    section = json.loads(capsys.readouterr().out)["sections"][-1]
    # 8,192 tokens are 256 blocks of 32; the prompt is read in full
    blocks = dict(dense=256, answer=2, prompt=256)
    assert section["numbers"]["retention"] == dict(budget=64, interval=32, blocks=blocks)
    assert section["numbers"]["memory"]["block_size"] == 32
    assert cli.main(arguments) == 1
    wrong = [f["text"] for f in json.loads(capsys.readouterr().out)["sections"][-1]["findings"] if f["mark"] == "✗"]
    assert len(wrong) == 1
    assert "128 go at a time, so use budget >= 256, or a smaller --block-size" in wrong[0]


def test_so_it_is_where_the_layers_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def capacity(*_: Any) -> Any:
        raise RuntimeError("no such thing on device meta")

    monkeypatch.setattr(capacity_module, "capacity", capacity)
    options = parse_options({"sparq": {"budget": 64, "format": "int4"}}, "h2o")
    section = model_section(model_folder(tmp_path), options, "h2o", ["--block-size", "32"])
    assert section.is_well
    assert "what a GiB of KV cache holds is unknown" in texts(section, "•")
    assert section.numbers["retention"]["interval"] == section.numbers["memory"]["block_size"] == 32


@pytest.mark.parametrize(("is_cuda", "tokens"), [(False, "1,024"), (True, "16,384")])
def test_the_break_even_is_the_platform_s(
    is_cuda: bool, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the engine there has it: CUDA's is sixteen times a CPU's."""
    monkeypatch.setattr(paged_engine, "current_platform", SimpleNamespace(is_cuda=lambda: is_cuda))
    section = model_section(model_folder(tmp_path, max_position_embeddings=32768), Options(k=64))
    assert section.is_well
    assert f"contexts below {tokens} tokens are read densely" in texts(section, "✓")
    assert ("at   4,096 tokens a step reads all of them" in texts(section, "•")) == is_cuda


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, dict(retention="heavy_hitter", budget=128, format="int4"), "128 go at a time, so use budget >= 256"),
        (dict(head_dim=40), {}, "head size 40 is not one of"),
        (dict(alibi=True), {}, "ALiBi adds a bias"),
        ({}, dict(r=65), "r=65 is larger than the model's head size 64: use r <= 64"),
        (dict(model_type="unheard_of", architectures=["UnheardOf"]), {}, "vLLM cannot read it"),
        (dict(num_attention_heads="x"), {}, "vLLM cannot read it: Validation error for field 'num_attention_heads': "),
        (
            dict(rope_parameters={"rope_type": "banana", "rope_theta": 1e6}),
            {},
            "vLLM cannot build the model on this machine, on any backend: Unknown RoPE scaling type banana",
        ),
        (dict(num_key_value_heads=0), {}, "vLLM cannot build the model on this machine, on any backend: "),
        (dict(num_key_value_heads=3), {}, "vLLM cannot build the model on this machine, on any backend: "),
    ],
)
def test_what_would_be_refused(config: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    section = model_section(model_folder(tmp_path, **config), Options(**options))
    assert not section.is_well
    assert message in texts(section, "✗")


@pytest.mark.parametrize(("make", "message"), [(False, "no such folder"), (True, "there is no config.json in it")])
def test_a_model_that_is_not_there(
    make: bool, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    if make:
        folder.mkdir()
    assert cli.main(["doctor", "--quick", "--model", str(folder)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope"], "vLLM does not take --nope: unrecognized arguments: --nope"),
        (["--max-model-len", "many"], "vLLM does not take --max-model-len many: argument --max-model-len: invalid"),
        (
            ["--speculative-config", '{"method": "ngram"}'],
            "vLLM refuses it on any backend: Value error, num_speculative_tokens",
        ),
        (["--tensor-parallel-size", "4"], "refused: --tensor-parallel-size 4 gives the query heads"),
        (["--block-size", "24"], "refused: --block-size 24 cannot be cut into pages: use a multiple of 16"),
    ],
)
def test_arguments_of_the_engine_are_looked_at(words: list[str], message: str, tmp_path: Path) -> None:
    section = model_section(model_folder(tmp_path), Options(), serve_args=words)
    assert not section.is_well
    assert message in texts(section, "✗")


def test_what_fits_depends_on_the_arguments_of_the_engine(tmp_path: Path) -> None:
    folder, short = model_folder(tmp_path), ["--max-model-len", "1024", "--tensor-parallel-size", "2"]
    whole, half = (model_section(folder, Options(), serve_args=words).numbers["memory"] for words in ([], short))
    assert half["requests_per_gib"]["sparq"] == pytest.approx(16 * whole["requests_per_gib"]["sparq"], rel=0.01)


@pytest.mark.parametrize(("config", "reason"), [("{", "Expecting"), ("[1]", "it holds a list"), ("\x80", "")])
def test_a_configuration_that_is_none(config: str, reason: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    assert cli.main(["doctor", "--quick", "--model", str(tmp_path)]) == 2
    assert f"its config.json is not a JSON object ({reason}" in capsys.readouterr().err


@pytest.mark.engine
def test_a_real_engine_runs_our_class_in_a_spawned_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine core is forked, which users' is not: what it has loaded takes as long as the worker's."""
    monkeypatch.setenv("VLLM_SPARQ_TESTS_FORK", "core")
    report = engine_check.check_engine(tmp_path)
    registering = r"\(VllmWorker-0 .*Registered new attention backend: QUEST"
    assert re.search(
        registering, (tmp_path / "engine.log").read_text()
    )  # by itself, in a process that inherits nothing
    assert {(layer["backend"], layer["impl"]) for layer in report["layers"].values()} == {("SPARQ", "PagedImpl")}
    assert len(report["layers"]) == 2
    assert report["n_tokens"] == engine_check.N_TOKENS


@pytest.mark.engine
def test_an_engine_that_fails_shows_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")  # vLLM loads no plugin, so it does not know sparq
    with pytest.raises(engine_check.EngineError, match="SPARQ") as caught:
        engine_check.check_engine(tmp_path)
    assert "the engine failed; its log says:" in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("sparq", "r = 8 of 64 channels of the int4 copy of K rank the tokens"),
        ("quest", "spans of 16 tokens"),
        ("infllm", "a window of the newest, and spans of 16 tokens between, looked up by the mean of 4 keys"),
        ("flexgen", "format int4: a cached token takes"),
        ("kivi", "format kivi4: a cached token takes"),
        ("h2o", "retention heavy_hitter: of 8,192 tokens a request keeps 1,024 per KV head"),
        ("streaming", "the first 4 and the newest"),
    ],
)
def test_each_backend_is_described_as_it_starts(
    backend: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(tmp_path)
    assert cli.main(["doctor", "--quick", "--model", folder, "--attention-backend", backend.upper()]) == 0
    out = capsys.readouterr().out
    assert message in out
    assert out.rstrip().endswith(f"All is well: vllm serve {folder} --attention-backend {backend}")


def test_the_last_line_is_a_command_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = '{"budget": 512}'
    folder = model_folder(tmp_path)
    arguments = ["doctor", "--quick", "--model", folder, "--attention-backend", "h2o", "--options", options]
    assert cli.main(arguments) == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.endswith(f"--attention-backend h2o --additional-config '{{\"sparq\": {options}}}'")
    assert cli.main([*arguments, "--serve-args", '["--override-generation-config", "{\\"temperature\\": [0]}"]']) == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.endswith("""}' --override-generation-config '{"temperature": [0]}'""")
    assert cli.main([*arguments[:2], "--serve-args", '["--dtype", "auto"]']) == 2
    assert "give --model as well" in capsys.readouterr().err
    assert cli.main([*arguments[:4], "--options", options]) == 2  # a budget means nothing while all tokens stay
    assert "budget=512 means nothing while all tokens stay" in capsys.readouterr().err
