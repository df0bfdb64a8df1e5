"""A fixed pool of engines on a Ray cluster: what each is given, and whether the cluster can hold them."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_sparq.backends import BACKENDS
from vllm_sparq.benchmarks.cluster.prompts import Prompt
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.proof import Report, WrongAttentionError, check_attention
from vllm_sparq.benchmarks.common.records import provenance
from vllm_sparq.benchmarks.common.server import WORKER_REPORT
from vllm_sparq.config import NAMESPACE, Options, OptionsError, check_place
from vllm_sparq.console import UsageError

SPARE_CPUS = 2
"""Logical CPUs beside those that the replicas reserve, for Ray Data's own tasks: without any it waits forever."""

CONNECT_TIMEOUT_S = 5.0

THIS_NODE = ("auto", "local")
"""Addresses of a cluster that this machine is a node of."""

AXES = ("format", "retention", "read")
"""Options that the name of a method stands for; any other one may be set beside it."""

REPLICA_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # replicas on one machine would all bind to its first cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A fixed number of replicas of one engine.

    Attributes:
        method: what each replica must prove that it runs.
        model: folder, on every node at the same place.
        replicas: their number.
        cpus: logical CPUs that a replica reserves.
        gpus: GPUs that a replica reserves.
        engine_arguments: what vLLM is given, `method.engine_args` included.
        temperature: of sampling; 0 is greedy.
        ignore_eos: answers have exactly their `max_tokens`.
        batch_size: rows that a replica is handed at a time.
        retries: times that a row or a replica is tried again.
        runtime_env: Ray's, for nodes that lack something.
    """

    method: Method
    model: Path
    replicas: int
    cpus: float = 1
    gpus: float = 0
    engine_arguments: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.0
    ignore_eos: bool = False
    batch_size: int = 16
    retries: int = 2
    runtime_env: dict[str, Any] = field(default_factory=dict)

    def sampling(self, prompt: Prompt) -> dict[str, Any]:
        """Keyword arguments of `vllm.SamplingParams`."""
        chosen: dict[str, Any] = {"temperature": self.temperature, "max_tokens": prompt.max_tokens}
        if self.temperature > 0:
            chosen["seed"] = prompt.seed
        return {**chosen, "ignore_eos": self.ignore_eos}

    @property
    def environment(self) -> dict[str, Any]:
        """`runtime_env` with the variables that every replica needs."""
        return {**self.runtime_env, "env_vars": {**REPLICA_ENVIRONMENT, **self.runtime_env.get("env_vars", {})}}


def engine_arguments(method: Method, *, gpus: float, kv_cache_mib: int | None, more: dict[str, Any]) -> dict[str, Any]:
    """What vLLM is given for a replica. ``more`` goes on top; options of ours in it join the method's.

    Raises:
        UsageError: ``more`` contradicts the method.
    """
    method = with_options(method, more)
    arguments: dict[str, Any] = {}
    if not gpus:
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": (kv_cache_mib or 512) << 20}
    elif kv_cache_mib:
        arguments["kv_cache_memory_bytes"] = kv_cache_mib << 20
    if method.backend is None:
        arguments["worker_extension_cls"] = WORKER_REPORT
    others = {name: value for name, value in _additional(more).items() if name != NAMESPACE}
    merged = {**arguments, **more, **method.engine_args}
    merged["additional_config"] = {**others, **merged.get("additional_config", {})} if method.backend else others
    if not merged["additional_config"]:
        del merged["additional_config"]
    return merged


def with_options(method: Method, more: Mapping[str, Any]) -> Method:
    """The method with the options of ours among engine arguments; vLLM's own attention takes none.

    Raises:
        UsageError: the arguments contradict what the method's name or --model stands for, or cannot be used.
    """
    if "model" in more:
        raise UsageError(f"engine argument model {more['model']!r}: the model is --model's: leave the argument out")
    nested = more.get("attention_config")
    backends = [more.get("attention_backend"), nested.get("backend") if isinstance(nested, Mapping) else None]
    for backend in (str(one).upper() for one in backends if one is not None):
        if backend != method.backend and (method.backend or backend in BACKENDS):
            raise UsageError(
                f"engine argument attention_backend {backend} contradicts the method {method.name!r}: leave it out, "
                "and name what shall run among --methods"
            )
    given = _additional(more).get(NAMESPACE, {})
    if method.backend is None or not given:
        return method
    if not isinstance(given, Mapping):
        raise UsageError(
            f"engine argument additional_config.{NAMESPACE} {given!r} must be an object of options, such as "
            '{"compression": 4}'
        )
    for axis in (axis for axis in AXES if axis in given):
        meant = getattr(method.parsed, axis)
        free = axis != "read" and meant == Options.model_fields[axis].default
        if given[axis] != meant and not free:
            raise UsageError(
                f"engine argument additional_config.{NAMESPACE}.{axis} {given[axis]!r} contradicts the method "
                f"{method.name!r}, which stands for {meant!r}: leave it out, or name another of --methods"
            )
    chosen = replace(method, options={**method.options, **given})
    chosen.check()
    return chosen


def _additional(more: Mapping[str, Any]) -> Mapping[str, Any]:
    found = more.get("additional_config") or {}
    if not isinstance(found, Mapping):
        raise UsageError(
            f'engine argument additional_config {found!r} must be an object, such as {{"{NAMESPACE}": {{...}}}}'
        )
    try:
        check_place(found)
    except OptionsError as error:
        raise UsageError(f"engine argument {error}") from None
    return found


def origin() -> str:
    """Code and machine of a replica, as JSON: what every row says of who made it."""
    return json.dumps(provenance(), sort_keys=True)


def preemptions(metrics: Mapping[str, Any] | None) -> int:
    """How often a request was preempted, from what vLLM tells of it.

    Raises:
        RuntimeError: it does not tell, and 0 would be a guess.
    """
    if not metrics or "num_preemptions" not in metrics:
        raise RuntimeError("vLLM does not tell how often a request was preempted: its log stats must be on")
    return int(metrics["num_preemptions"])


def proven(method: Method, reports: list[Report] | Exception) -> str:
    """The attention classes of a replica, from the answers of its workers.

    Raises:
        WrongAttentionError: they are not the method's, or a worker cannot tell, as vLLM's own ones cannot.
    """
    if isinstance(reports, Exception):
        raise WrongAttentionError(
            f"the engine of {method.name!r} cannot say which attention it runs ({reports}): nothing was measured"
        )
    return {check_attention(method, report) for report in reports}.pop()


def check_address(address: str) -> None:
    """See whether anybody listens, since Ray itself would try for minutes.

    Raises:
        UsageError: nobody does.
    """
    if address in THIS_NODE:
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or (10001 if parts.scheme == "ray" else 6379)
    except ValueError:
        host, port = None, 0
    if not host:
        raise UsageError(f"--address {address}: write ray://HOST:10001, HOST:6379 or auto")
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S):
            pass
    except OSError as error:
        raise UsageError(
            f"--address {address}: nothing answers at {host}:{port} ({error}); start a cluster with "
            "`ray start --head`, or leave --address out to use this machine alone"
        ) from None


def check_cores(replicas: int, cpus: float) -> None:
    """Whether this machine has a core for every CPU that the replicas reserve.

    Raises:
        UsageError: it has not.
    """
    needed, cores = replicas * cpus, len(os.sched_getaffinity(0))
    if needed > cores:
        raise UsageError(
            f"{replicas} replicas of {cpus:g} CPUs need {needed:g}, and this machine has {cores}: ask for "
            f"{int(cores // cpus)} --replicas or less, or give the --address of a larger cluster"
        )


@contextlib.contextmanager
def cluster(pool: Pool, address: str | None) -> Iterator[None]:
    """A connection to the cluster at `address`, or one on this machine that ends with the context.

    Raises:
        UsageError: Ray is not installed, nobody answers, or the cluster has too few CPUs or GPUs.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "Ray is not installed: pip install 'ray[data,serve]' pyarrow matplotlib; not ray[llm], it pins another vLLM"
        )
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    options: dict[str, Any] = dict(runtime_env=pool.environment, log_to_driver=False, logging_level=logging.ERROR)
    if address is None:
        n_cpus = int(pool.replicas * pool.cpus + 2 * SPARE_CPUS + 0.999)
        options |= dict(address="local", num_cpus=n_cpus, include_dashboard=False)
    else:
        options["address"] = address
    try:
        ray.init(**options)
        ray_silence()
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0]
        raise UsageError(
            f"--address {address}: Ray cannot connect: {first}. It must be the head of a Ray {ray.__version__} "
            "cluster. One started where there is a ~/.ray/auth_token asks for that token: bring the file and set "
            "RAY_AUTH_MODE=token"
        ) from None
    try:
        resources: Any = ray.cluster_resources()  # type: ignore[no-untyped-call]
        _check_resources(pool, resources)
        if address is not None:
            _check_plugin(address)
        yield
    finally:
        ray.shutdown()


def _check_plugin(address: str) -> None:
    """Refuse a cluster whose nodes lack this plugin, which every replica would tell much later."""
    import ray

    def found() -> bool:
        return importlib.util.find_spec("vllm_sparq") is not None

    if not ray.get(ray.remote(num_cpus=0)(found).remote()):
        raise UsageError(
            f"--address {address}: its nodes lack vllm-sparq: install it there, or bring it with --ship WHEEL "
            "(`pip wheel --no-deps .` makes one)"
        )


def ray_silence() -> None:
    """Errors only, of every part of Ray that is loaded: each part sets its own level when it is."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "ray":
            logging.getLogger(name).setLevel(logging.ERROR)


@functools.cache
def unpacked(wheel: Path) -> tuple[str, ...]:
    """The folders in a wheel of this plugin, for Ray's ``py_modules``: the package, and what names its entry points.

    Not the wheel itself: Ray would install it with all that it requires, and a vLLM and a torch from the package index
    would take the place of the node's own.
    """
    folder = Path(tempfile.mkdtemp(prefix="vllm-sparq-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    names = sorted(path.name for path in folder.iterdir())
    if "vllm_sparq" not in names:
        raise UsageError(
            f"--ship {wheel}: it holds {', '.join(names)}, not vllm_sparq; `pip wheel --no-deps .` makes one"
        )
    return tuple(str(folder / name) for name in names)


@contextlib.contextmanager
def stderr_to(log: Path) -> Iterator[None]:
    """What Ray and its native parts print meanwhile goes to the end of a file."""
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def _check_resources(pool: Pool, resources: dict[str, float]) -> None:
    for name, each, spare in (("CPU", pool.cpus, SPARE_CPUS), ("GPU", pool.gpus, 0)):
        needed, there = pool.replicas * each, resources.get(name, 0)
        if each and needed + spare > there:
            beside = f" and {spare} beside them" if spare else ""
            raise UsageError(
                f"{pool.replicas} replicas need {needed:g} {name}s{beside}, and the cluster has {there:g}: ask for "
                f"fewer --replicas or add nodes"
            )
