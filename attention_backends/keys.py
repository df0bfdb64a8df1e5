"""Whether 4 bits per token can hold a model's K, and a line in the log where they cannot.

A format that codes the channels of a token together (``int4``) gives all of them the range of the largest. Where some
channels of K lie far from the others, as projections with a bias make them, or where attention is sharp, the error that
is left moves it, and answers suffer although the format is lossless on other models. A projection's bias is seen when
the model is loaded; what codes do to the attention of the first prompt, in every layer, when it is read.
"""

from __future__ import annotations

import torch

from vllm_sparq.config import Options
from vllm_sparq.formats import FORMATS
from vllm_sparq.layout import PageLayout
from vllm_sparq.ops.codec import dequantize, pack, quantize

MOST_MOVED = 0.4
"""Nats that codes may move attention by, in the worst KV head of a layer. ``int4`` moves it by .03 to .20 in the layers
of SmolLM2, where it costs .001 to .004 bits per byte; by .06, .83 and 1.01 in those of Gemma 3 270M, where it costs
.063. On neither model does ``k8v4`` move it by more than .02."""

LEAST_TOKENS, MOST_TOKENS = 64, 512
"""Of a prompt: fewer say little, more say the same."""

EVERY = 8
"""One query of so many is asked."""

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


def attention_moved(query: torch.Tensor, keys: torch.Tensor, layout: PageLayout, scale: float) -> float:
    """KL divergence, in nats, of attention over the codes of K from that over K: a mean, of the worst KV head.

    Args:
        query: [T, H, D], of a prompt's tokens.
        keys: [T, G, D], theirs.
        layout: of the pages, whose format K is coded in.
        scale: of a logit.
    """
    keys, coding, worst = keys[:MOST_TOKENS], layout.coding("key"), 0.0
    rows = torch.arange(LEAST_TOKENS // 2, len(keys), EVERY, device=keys.device)
    hidden = torch.arange(len(keys), device=keys.device) > rows[:, None]
    for head, queries in zip(keys.unbind(1), query[rows].float().chunk(keys.shape[1], dim=1), strict=True):
        codes, scales = quantize(head, coding, layout.group("key"))
        coded = dequantize(pack(codes, coding.bits), scales, coding)
        exact, moved = (
            (scale * queries.transpose(0, 1) @ k.float().T).masked_fill(hidden, -torch.inf).log_softmax(-1)
            for k in (head, coded)
        )
        divergence = torch.where(hidden, 0.0, exact.exp() * (exact - moved)).sum(-1)
        worst = max(worst, float(divergence.mean()))
    return worst


def moved_warning(format: str) -> str:
    """For the log, once for all layers."""
    return (
        f"format {format!r} stores the channels of a token's K together in 4 bits, and in a layer of this model that "
        f"moves attention by more than {MOST_MOVED} nats: answers may be wrong. {INSTEAD}"
    )
