"""Which backend each layer of a built model runs on, and whether any of them is ours: the same check for all who ask.

Workers ask once the model is loaded, and doctor of a model that is built without weights. A configuration alone does
not tell: a model may pin a backend of its own, or give each of its layers a sliding window.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_sparq.attention_backends.engine import selected_backends
from vllm_sparq.attention_backends.refusals import DENSE
from vllm_sparq.backends import BACKENDS

OTHER_WIDTHS = "_DIFFKV"
"""What the names of vLLM's backends for K and V of different widths end with, which models such as MiMo-V2 pin."""


def layers_by_backend(vllm_config: Any) -> dict[str, int]:
    """Name of a backend -> how many layers of the model that was built with this configuration run on it."""
    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    found: dict[str, int] = {}
    for layer in layers.values():
        name = layer.get_attn_backend().get_name()
        found[name] = found.get(name, 0) + 1
    return found


def silence_refusal(vllm_config: Any, found: dict[str, int]) -> str | None:
    """Why an engine whose layers run on these backends must not start; None if some layer runs on one of ours.

    Args:
        vllm_config: its configuration.
        found: from `layers_by_backend`, over all stages of a pipeline.
    """
    if any(name in BACKENDS for name in found):
        return None
    wanted = " and ".join(f"--attention-backend {name}" for name in selected_backends(vllm_config))
    layers = ", ".join(f"{n} on {name}" for name, n in sorted(found.items())) or "none has a KV cache"
    why = "its layers have sliding windows, or it pins a backend of its own"
    if any(name.endswith(OTHER_WIDTHS) for name in found):
        why = "heads of its V are not as wide as those of its K"
    return (
        f"{wanted} was selected, but no layer of the model runs on it: {layers} ({why}), so that nothing would be read "
        f"sparsely or stored smaller: {DENSE}"
    )
