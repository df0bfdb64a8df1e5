"""How many threads an engine computes with on a CPU: part of the case that is measured, as the machine is."""

from __future__ import annotations

import os
from typing import Any

BIND = "VLLM_CPU_OMP_THREADS_BIND"


def engine_threads(own: int | None = None) -> dict[str, Any]:
    """What a key says of the threads of an engine that we start, which has our environment.

    vLLM's worker sets no number of its own where engines are not bound to cores: it takes that of OpenMP, which is
    ``OMP_NUM_THREADS``, else as many as the cores that the process may use; torch says so in this process. Where the
    user's environment binds engines, the binding is a part of the case as it is written.

    Args:
        own: what the command asks for where the user's environment says nothing.
    """
    import torch

    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    threads = int(first) if first.isdecimal() and int(first) else own or torch.get_num_threads()
    return {"threads": threads, "bound": os.environ.get(BIND, "nobind")}
