"""Whether 4 bits per token can hold a model's K, and a line in the log where they cannot.

A format that codes the channels of a token together (``int4``) gives all of them the range of the largest. Where some
channels of K lie far from the others, as projections with a bias make them, little is left for these, and answers
suffer although the format is lossless on other models. A projection's bias is seen when the model is loaded; what the
first prompt's K is like, in every layer, when it is read.
"""

from __future__ import annotations

import torch

from vllm_sparq.config import Options
from vllm_sparq.formats import FORMATS
from vllm_sparq.layout import PageLayout
from vllm_sparq.ops.codec import dequantize, pack, quantize

MOST_NOISE = 0.5
"""Of the variance of half of the channels, what codes may add as an error. SmolLM2 has .04 to .19 in its layers and
Gemma 3 .02 to .12, which int4 costs nothing; one constant channel of 60 deviations makes it .8 to 2, and int4 costs
.14 bits per byte there."""

LEAST_TOKENS, MOST_TOKENS = 64, 512
"""Of a prompt: fewer say little about a channel, more say the same."""

BIASES = ("qkv_proj.bias", "k_proj.bias", "query_key_value.bias", "Wqkv.bias", "qkv.bias", "c_attn.bias")
"""How the biases of projections that make K are called in vLLM's models."""

INSTEAD = (
    '--additional-config \'{"sparq": {"format": "k8v4"}}\' holds them in 8 bits, and --attention-backend kivi in 4 by '
    "channel; measure it: vllm-sparq eval --tasks text --methods int4,k8v4,kivi"
)


def is_fragile(options: Options) -> bool:
    """Whether K is stored in 4 bits or fewer, the channels of a token together."""
    stored = FORMATS[options.format]
    return stored is not None and not stored.key.channels and stored.key.bits <= 4


def biased_projections(model: torch.nn.Module) -> int:
    """How many projections of a model add a bias to K."""
    return sum(name.endswith(BIASES) for name, _ in model.named_parameters())


def bias_warning(format: str, n_layers: int) -> str:
    """For the log and for doctor."""
    return (
        f"format {format!r} stores the channels of a token's K together in 4 bits, and {n_layers} projections of this "
        f"model add a bias to K, which lifts some channels out of that range: answers may be wrong. {INSTEAD}"
    )


def noise_of_codes(keys: torch.Tensor, layout: PageLayout) -> float:
    """The error of codes for K [T, G, D], as a share of a channel's variance: of the median channel, in the worst head.

    Channels that hardly vary have no say: what never changes is not told apart by attention.
    """
    worst, coding = 0.0, layout.coding("key")
    for head in keys[:MOST_TOKENS].unbind(1):
        codes, scales = quantize(head, coding, layout.group("key"))
        error = dequantize(pack(codes, coding.bits), scales, coding) - head.float()
        variance = head.float().var(0)
        says = variance > 1e-6 * variance.max()
        if says.any():
            worst = max(worst, float((error.square().mean(0)[says] / variance[says]).median()))
    return worst


def noise_warning(format: str) -> str:
    """For the log, once for all layers."""
    return (
        f"format {format!r} stores the channels of a token's K together in 4 bits, and in a layer of this model some "
        f"channels are so large that codes add more than {MOST_NOISE} of the variance of the others as an error: "
        f"answers may be wrong. {INSTEAD}"
    )
