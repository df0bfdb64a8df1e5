"""What a measurement of `bench ray` is of: what decides its answers and its rates, and by what it is found again."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from typing import Any

from vllm_sparq.benchmarks.cluster.prompts import Survey
from vllm_sparq.benchmarks.cluster.replicas import THIS_NODE, Pool
from vllm_sparq.benchmarks.common.fingerprint import fingerprint
from vllm_sparq.benchmarks.common.records import VERSIONS, case_key, origin_of, provenance

CODE = ("commit", "dirty", "changes", *VERSIONS)
"""What of `provenance` this process knows of replicas on other machines, too: what they must share to be measured."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One method over all prompts.

    Attributes:
        pool: what answers.
        case: what decides the answers and the rates, in values that JSON can hold.
        key: of the case, in a file of records.
        about: fields of its record that the case lacks.
    """

    pool: Pool
    case: dict[str, Any]
    key: str
    about: dict[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace, pool: Pool, found: Survey) -> Measurement:
        """From the options of the command line."""
        case = case_of(args, pool, found)
        return cls(pool=pool, case=case, key=key_of(args, case), about=about(args, pool, found))

    @property
    def name(self) -> str:
        """Of its method."""
        return self.pool.method.name


def case_of(args: argparse.Namespace, pool: Pool, found: Survey) -> dict[str, Any]:
    """What decides the answers, and beside that what decides how fast they come."""
    from vllm_sparq.benchmarks.quality.store import digest

    answers = {
        "model": pool.model.name,
        "fingerprint": fingerprint(pool.model),  # of two models in folders of one name
        "method": pool.method.name,
        "engine_arguments": pool.engine_arguments,
        "data": found.digest,
        "temperature": pool.temperature,
        "ignore_eos": pool.ignore_eos,
    }
    speed = {
        "replicas": pool.replicas,
        "cpus_per_replica": float(pool.cpus),  # as JSON, 1 and 1.0 are two cases
        "gpus_per_replica": float(pool.gpus),
        "batch_size": pool.batch_size,
        "runner": args.runner,
        "address": args.address,
        # Digests: the variables in an environment may be secret.
        "runtime_env": digest(args.runtime_env) if args.runtime_env else None,
        "ship": hashlib.sha256(args.ship.read_bytes()).hexdigest()[:16] if args.ship else None,
    }
    return answers | speed


def key_of(args: argparse.Namespace, case: dict[str, Any]) -> str:
    """Of a case in a file of records.

    The machines of another cluster are not known before its replicas start: there the address stands for them, and not
    the machine that this process happens to be on.
    """
    from vllm_sparq.benchmarks.quality.store import digest

    return case_key("ray", case) if args.address in (None, *THIS_NODE) else digest("ray", case)


def code_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a folder of answers belongs to beside a case: the code, and this machine if the replicas are on it."""
    here = origin_of(provenance())
    return here if args.address is None else {name: here[name] for name in CODE}


def about(args: argparse.Namespace, pool: Pool, found: Survey) -> dict[str, Any]:
    """What a reader wants to know of a case beside what identifies it."""
    source = {"source": args.data.name} if args.data else {"source": "needle", "input_len": args.input_len}
    return {
        "bench": "ray",
        "options": pool.method.options,
        "rows": found.n_rows,
        **source,
        "output_len": args.output_len,
        "seed": args.seed,
        "dtype": pool.engine_arguments.get("dtype", "auto"),
    }
