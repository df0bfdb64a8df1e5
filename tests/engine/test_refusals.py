"""What cannot be served is refused before the model loads, with the value, the rule and the remedy.

One table of configurations (`tests.engine.refused`), which goes through vLLM's own start in this process, through
`vllm serve` up to the engine, and through `vllm-sparq doctor`; some of it through a server's process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.refused import CASES, COMPRESSED_TENSORS, DENSE, MODELOPT, Case, altered, backend_flags, flags
from tests.engine.support import MODEL
from vllm_sparq.attention_backends.refusals import engine_refusals

pytestmark = pytest.mark.engine

ALIBI = rf"ALiBi adds a bias to the scores{DENSE}"


def start(model: Path = MODEL, options: Any = None, **engine_args: Any) -> Any:
    """As far as `vllm serve` comes before it loads a model, which is where we refuse."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(model),
        **({} if "attention_config" in engine_args else {"attention_backend": "sparq"}),
        additional_config={"sparq": {} if options is None else options},
        skip_tokenizer_init=True,
        load_format="dummy",
        **engine_args,
    ).create_engine_config()


@pytest.mark.parametrize("name", CASES)
def test_refused_before_loading(name: str, folder_of: Any) -> None:
    case = CASES[name]
    with pytest.raises(ValueError, match=case.message):
        start(folder_of(case), case.options, **case.arguments)


def test_there_are_thirty() -> None:
    assert len(CASES) >= 30


def test_good_model_is_not_refused() -> None:
    start()


CHANGED: dict[str, tuple[str, Any, str]] = {
    "decode context parallelism": (
        "parallel_config.decode_context_parallel_size",
        2,
        r"--decode-context-parallel-size 2 splits a request's tokens over workers.*: set it to 1",
    ),
    "prefill context parallelism": (
        "parallel_config.prefill_context_parallel_size",
        4,
        r"--prefill-context-parallel-size 4 splits a request's tokens over workers.*: set it to 1",
    ),
    "attention that is not causal": (
        "attention_config.use_non_causal",
        True,
        rf"non-causal attention \(use_non_causal\) is not supported{DENSE}",
    ),
    "drafts trimmed on the device": (
        "speculative_config",
        SimpleNamespace(enable_adaptive_verification=True, method="ngram"),
        r"enable_adaptive_verification trims drafts on the device.*: leave it out of --speculative-config",
    ),
    "reference sliding windows": (
        "model_config.model_arch_config.rswa_window",
        512,
        rf"reference sliding windows \(rswa_window=512\) are not supported{DENSE}",
    ),
    "64 bits": (
        "model_config.dtype",
        torch.float64,
        r"dtype torch\.float64 is not bfloat16, float16 or float32: set --dtype",
    ),
    "ALiBi of Falcon": ("model_config.hf_text_config.alibi", True, ALIBI),
    "ALiBi by use_alibi": ("model_config.hf_text_config.use_alibi", True, ALIBI),
    "ALiBi of MPT": ("model_config.hf_text_config.attn_config", {"alibi": True}, ALIBI),
    "ALiBi of MPT, in an object": ("model_config.hf_text_config.attn_config", SimpleNamespace(alibi=True), ALIBI),
    "ALiBi as a position embedding": ("model_config.hf_text_config.position_embedding", "ALiBi", ALIBI),
    "ALiBi as a type of them": ("model_config.hf_text_config.position_embedding_type", "alibi", ALIBI),
}
"""What no checkpoint of ours says, or takes more devices -> what is changed of a good configuration, and the reason."""


@pytest.mark.parametrize("name", CHANGED)
def test_one_change_of_a_good_configuration_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's platform and our worker ask: for one reason, which the change is."""
    where, value, message = CHANGED[name]
    config = start()
    assert not engine_refusals(config)
    *path, attribute = where.split(".")
    monkeypatch.setattr(functools.reduce(getattr, path, config), attribute, value, raising=False)
    (reason,) = engine_refusals(config)
    assert re.match(message, reason), reason


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("alibi", False),
        ("attn_config", {"alibi": False}),
        ("position_embedding", "rope"),
        ("position_embedding_type", "rope"),
    ],
)
def test_who_says_that_there_is_no_alibi_is_believed(attribute: str, value: Any) -> None:
    config = start()
    setattr(config.model_config.hf_text_config, attribute, value)
    assert not engine_refusals(config)


def test_dense_layers_may_be_all_of_a_drafting_model_or_of_a_dense_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a drafting model reads changes no answer, and where nothing is read sparsely nothing is missing."""
    assert not engine_refusals(start(options={"read": "dense", "dense_layers": 4}))
    config = start(options={"dense_layers": 3})
    monkeypatch.setattr(config.model_config.hf_text_config, "num_hidden_layers", 1)
    (reason,) = engine_refusals(config)
    assert "dense_layers=3 leaves none of the model's 1 layers" in reason
    monkeypatch.setattr(config.model_config, "runner_type", "draft")
    assert not [reason for reason in engine_refusals(config) if "dense_layers" in reason]


def test_images_are_refused_with_the_flag_that_serves_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Gemma 3 and 4, which see an image's tokens in both directions; building one takes torchvision."""
    from vllm.config import ModelConfig

    monkeypatch.setattr(ModelConfig, "is_mm_prefix_lm", True)
    message = r"""images in bidirectional prefixes.*--limit-mm-per-prompt '{"image": 0, "video": 0}', or use vLLM"""
    with pytest.raises(ValueError, match=message):
        start()


def test_prefix_caching_is_switched_off_where_tokens_are_evicted() -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(MODEL),
        attention_backend="h2o",
        additional_config={"sparq": {"pressure": "evict"}},
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
    ).create_engine_config()
    assert not config.cache_config.enable_prefix_caching
    assert config.scheduler_config.scheduler_cls == "vllm_sparq.scheduler.scheduler.EvictingScheduler"


def test_a_worker_of_the_user_s_own_that_derives_from_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_sparq.attention_backends.cpu_worker import SparqCpuWorker

    monkeypatch.setattr(sys.modules[__name__], "Derived", type("Derived", (SparqCpuWorker,), {}), raising=False)
    config = start(worker_cls=f"{__name__}.Derived")
    assert config.parallel_config.worker_cls == f"{__name__}.Derived"


@pytest.mark.parametrize("scheme", [MODELOPT, COMPRESSED_TENSORS], ids=["ModelOpt", "compressed-tensors"])
def test_the_remedy_for_a_declared_fp8_cache_starts(scheme: dict[str, Any], tmp_path: Path, engine: Any) -> None:
    folder = altered(tmp_path, {"quantization_config": scheme})
    small = dict(max_model_len=256, kv_cache_memory_bytes=8 << 20, max_num_batched_tokens=256, load_format="dummy")
    with engine("sparq", model=str(folder), dtype="bfloat16", kv_cache_dtype="bfloat16", **small) as llm:
        (report,) = llm.collective_rpc("attention_report")
        assert {layer["backend"] for layer in report.values()} == {"SPARQ"}


def test_what_vllm_makes_of_the_configuration_later_is_refused_in_the_worker() -> None:
    """Where our look at the driver's configuration came too early, or was passed by."""
    from vllm.config import KVTransferConfig

    from vllm_sparq.attention_backends.worker import SparqWorkerMixin

    class Base:
        def load_model(self) -> None:
            raise AssertionError("loaded")

    class Worker(SparqWorkerMixin, Base):
        vllm_config = start()

    Worker.vllm_config.kv_transfer_config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    with pytest.raises(ValueError, match=r"KV connector copies dense K and V.*start without --kv-transfer-config"):
        Worker().load_model()


@pytest.fixture
def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model of a case, in its environment."""

    def made(case: Case) -> Path:
        for variable, value in case.environment.items():
            monkeypatch.setenv(variable, value)
        return altered(tmp_path, case.model) if case.model else MODEL

    return made


@pytest.mark.parametrize("name", CASES)
def test_doctor_refuses_the_same(name: str, folder_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In its findings, or at once where options mean nothing whatever the model is."""
    from vllm_sparq.cli import main

    case = CASES[name]
    words = ["doctor", "--quick", "--json", "--model", str(folder_of(case))]
    words += ["--options", json.dumps(case.options), "--serve-args", json.dumps([*flags(case)])]
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    if code == 2:
        assert re.search(case.doctor or case.message, said.err), said.err
        return
    sections = json.loads(said.out)["sections"]
    wrong = [line["text"] for section in sections for line in section["findings"] if line["mark"] == "✗"]
    assert code == 1
    assert re.search(case.message, "; ".join(wrong).replace("refused: ", "")), wrong


@pytest.fixture
def vllm_serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`vllm serve` in this process, up to the moment in which it would start an engine."""
    from vllm.entrypoints.cli.main import main
    from vllm.v1.engine.async_llm import AsyncLLM

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine would have been started")

    monkeypatch.setattr(AsyncLLM, "__init__", started)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # which vLLM would set for good

    def serve(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["vllm", "serve", *words])
        main()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield serve
    for number, handler in handlers.items():
        signal.signal(number, handler)


ASKED_OF_SERVERS = [
    name
    for name, case in CASES.items()
    if case.arguments
    or case.environment
    or name in ("unknown option", "options that are no object", "eviction from shared KV caches")
]
"""Cases with flags or variables of their own, and some of options, of a model and of both.

Other cases differ from these in what one JSON string, or a file that nobody has read yet, says.
"""


@pytest.mark.parametrize("name", ASKED_OF_SERVERS)
def test_vllm_serve_refuses_the_same(name: str, folder_of: Any, vllm_serve: Any) -> None:
    case = CASES[name]
    with pytest.raises(ValueError, match=case.message):
        vllm_serve(str(folder_of(case)), "--load-format", "dummy", "--port", "0", *backend_flags(case), *flags(case))


@pytest.mark.parametrize("name", ["offloading", "a worker of CUDA's", "fp8 by compressed-tensors"])
@pytest.mark.long
def test_vllm_serve_says_so(name: str, tmp_path: Path) -> None:
    """The message is the last thing that a user sees, and no engine has been started for it."""
    case = CASES[name]
    folder = altered(tmp_path, case.model)
    vllm = Path(sys.executable).with_name("vllm")
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [str(vllm), "serve", str(folder), "--load-format", "dummy", *backend_flags(case), *flags(case)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert ended.returncode != 0
    said = ended.stdout + ended.stderr
    assert re.search(case.message, said[-2000:]), said[-4000:]
    assert "EngineCore" not in said


def test_the_older_ray_executor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hands steps to the model runner past our worker."""
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    with pytest.raises(ValueError, match=r"VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0.*unset it"):
        start(distributed_executor_backend="ray")
    monkeypatch.delenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND")
    start(distributed_executor_backend="ray")
