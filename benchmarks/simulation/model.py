"""What the simulations of methods share: the bundled model with an attention of ours, read in plain torch.

`load` gives a Hugging Face model whose layers ask whatever is `running` for their attention. One request at a time,
`answer` writes its greedy answer. `read_prompts` reads many prompts densely, and `decode` then answers all of them at
once, each new token attending as a function says; what was read is used again by the next function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_sparq.benchmarks.tasks.generated import Example

ATTENTION = "sparq_simulation"

WINDOW = 256
"""Tokens after a token whose attention it gathers while a prompt is read (`local_attention`)."""


class Attention(Protocol):
    """Stands in for the attention of every layer."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [B, G, H/G, T, D] of the newest tokens, k and v [B, G, S, D] of all; returns [B, G, H/G, T, D]."""


_running: Attention | None = None


@contextmanager
def running(attention: Attention) -> Iterator[None]:
    """Let every layer attend so."""
    global _running
    before, _running = _running, attention
    try:
        yield
    finally:
        _running = before


def simulated_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Signature of transformers: query [B, H, T, D], key and value [B, G, S, D]; returns [B, T, H, D]."""
    if _running is None:
        raise RuntimeError("the simulated model attends only inside `running`")
    q = query.unflatten(1, (key.shape[1], -1)).float()
    out = _running.attend(module.layer_idx, q, key.float(), value.float(), scaling)
    return out.flatten(1, 2).transpose(1, 2).to(query.dtype), None


def load(folder: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer, attending as what is `running` says."""
    AttentionInterface.register(ATTENTION, simulated_attention)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=ATTENTION).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def load_plain(folder: Path) -> tuple[Any, Any]:
    """The same with the attention of transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


class Answer:
    """The greedy answer to an example while it grows, cut at the first stop string."""

    def __init__(self, tokenizer: Any, example: Example) -> None:
        self.tokenizer, self.example = tokenizer, example
        self.tokens: list[int] = []
        self.text = ""
        self.done = False

    def add(self, token: int) -> None:
        """The next token; nothing changes once the answer is done."""
        if self.done or token == self.tokenizer.eos_token_id:
            self.done = True
            return
        self.tokens.append(token)
        self.text = str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        ends = [self.text.index(stop) for stop in self.example.stop if stop in self.text]
        if ends:
            self.text = self.text[: min(ends)]
        self.done = bool(ends) or len(self.tokens) == self.example.max_tokens


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, example: Example, cache: DynamicCache) -> str:
    """The greedy answer of any model to one example."""
    ids = tokenizer(example.prompt, return_tensors="pt").input_ids
    found = Answer(tokenizer, example)
    while not found.done:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        found.add(int(ids))
    return found.text


@dataclass(kw_only=True)
class Contexts:
    """Prompts that have been read. Tensors have room after each prompt for its answer.

    Attributes:
        examples: B of them.
        lengths: int64 [B], tokens of the prompts.
        first: int64 [B], the first tokens of the answers.
        keys, values: per layer [B, G, S, D]; what lies after a prompt and its answer means nothing.
        heat: per layer [B, G, H/G, S], see `local_attention`; empty where it was not asked for.
    """

    examples: Sequence[Example]
    lengths: torch.Tensor
    first: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    heat: list[torch.Tensor]

    def places(self, n_new: int) -> torch.Tensor:
        """int64 [B], positions of the n-th new tokens; what follows an answer's end stays within the room."""
        return (self.lengths + n_new - 1).clamp(max=self.keys[0].shape[2] - 1)


@dataclass
class _Dense:
    """Reads a prompt, and notes `local_attention` where it is asked for."""

    with_heat: bool
    heat: dict[int, torch.Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if self.with_heat:
            self.heat[layer] = local_attention(q[0], k[0], scale)
        out: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
            q.flatten(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.reshape(q.shape)


def local_attention(q: torch.Tensor, k: torch.Tensor, scale: float, window: int = WINDOW) -> torch.Tensor:
    """[G, H/G, T]: what each token gets, in sum, of the softmax of every token over the ``window`` tokens up to itself.

    q [G, H/G, T, D] and k [G, T, D] of one prompt.
    """
    n_tokens = k.shape[1]
    found = torch.zeros(q.shape[:-1])
    for start in range(0, n_tokens, window):
        end, first = min(start + window, n_tokens), max(0, start - window)
        distance = torch.arange(start, end)[:, None] - torch.arange(first, end)
        logits = scale * q[:, :, start:end] @ k[:, None, first:end].transpose(-1, -2)
        logits = logits.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        found[..., first:end] += logits.softmax(-1).sum(-2)
    return found


@torch.inference_mode()
def read_prompts(model: Any, tokenizer: Any, examples: Sequence[Example], *, with_heat: bool = False) -> Contexts:
    """Read every prompt densely, one after the other."""
    prompts = [tokenizer(example.prompt, return_tensors="pt").input_ids for example in examples]
    room = max(ids.shape[1] + example.max_tokens for ids, example in zip(prompts, examples, strict=True))
    config = model.config
    shape = len(examples), config.num_key_value_heads, room, config.head_dim
    layers = range(config.num_hidden_layers)
    keys, values = ([torch.zeros(shape) for _ in layers] for _ in range(2))
    n_queries = config.num_attention_heads // config.num_key_value_heads
    heat = [torch.zeros(*shape[:2], n_queries, room) for _ in layers] if with_heat else []
    first = []
    for b, ids in enumerate(prompts):
        cache, dense = DynamicCache(), _Dense(with_heat)
        with running(dense):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        first.append(int(logits[0, -1].argmax()))
        for layer in layers:
            found: Any = cache.layers[layer]
            keys[layer][b, :, : ids.shape[1]] = found.keys[0]
            values[layer][b, :, : ids.shape[1]] = found.values[0]
            if with_heat:
                heat[layer][b, :, :, : ids.shape[1]] = dense.heat[layer]
    lengths = torch.tensor([ids.shape[1] for ids in prompts])
    return Contexts(examples=examples, lengths=lengths, first=torch.tensor(first), keys=keys, values=values, heat=heat)


@dataclass(kw_only=True)
class Step:
    """One layer of one step of decoding: a new token of each of B requests.

    Attributes:
        q: [B, G, H/G, D], of the new tokens.
        k, v: [B, G, S, D], the new tokens' included; rotated to the tokens' own positions.
        lengths: int64 [B], tokens of each request, the new one included.
        n_prompt: int64 [B], tokens of each prompt.
        scale: of the logits.
        theta: base of the rotary embedding.
        heat: [B, G, H/G, S] of the prompts' tokens, see `local_attention`.
        memory: the function's own, kept from step to step of a layer.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor
    n_prompt: torch.Tensor
    scale: float
    theta: float
    heat: torch.Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [S]."""
        return torch.arange(self.k.shape[2])

    @cached_property
    def exist(self) -> torch.Tensor:
        """bool [B, 1, S]: the tokens of each request."""
        return (self.positions < self.lengths[:, None])[:, None]


Read = Callable[[Step], torch.Tensor]
"""Attention of a step's new tokens, [B, G, H/G, D]."""


@dataclass
class _Decoding:
    """Lets a `Read` attend, and keeps its memory of each layer."""

    contexts: Contexts
    read: Read
    theta: float
    n_new: int = 0
    memories: dict[int, dict[str, Any]] = field(default_factory=dict)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        contexts = self.contexts
        step = Step(
            q=q[..., 0, :],
            k=k,
            v=v,
            lengths=contexts.places(self.n_new) + 1,
            n_prompt=contexts.lengths,
            scale=scale,
            theta=self.theta,
            heat=contexts.heat[layer] if contexts.heat else None,
            memory=self.memories.setdefault(layer, {}),
        )
        return self.read(step)[..., None, :]


class _Ragged(DynamicCache):
    """K and V of `Contexts`; new tokens go after the end of each request."""

    def __init__(self, contexts: Contexts) -> None:
        super().__init__()
        self.contexts, self.n_new = contexts, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any) -> Any:
        """K and V [B, G, 1, D] of the new tokens."""
        keys, values = self.contexts.keys[layer_idx], self.contexts.values[layer_idx]
        row, slot = torch.arange(keys.shape[0]), self.contexts.places(self.n_new)
        keys[row, :, slot], values[row, :, slot] = key_states[:, :, 0], value_states[:, :, 0]
        return keys, values


@torch.inference_mode()
def decode(model: Any, tokenizer: Any, contexts: Contexts, read: Read) -> list[Answer]:
    """The greedy answers to all prompts, whose new tokens attend as ``read`` says."""
    answers = [Answer(tokenizer, example) for example in contexts.examples]
    theta = float(model.config.rope_parameters["rope_theta"])
    cache, decoding, tokens = _Ragged(contexts), _Decoding(contexts, read, theta), contexts.first
    with running(decoding):
        while True:
            for one, token in zip(answers, tokens.tolist(), strict=True):
                one.add(token)
            if all(one.done for one in answers):
                return answers
            cache.n_new = decoding.n_new = decoding.n_new + 1
            at = contexts.places(decoding.n_new)[:, None]
            logits = model(tokens[:, None], position_ids=at, past_key_values=cache, use_cache=True).logits
            tokens = logits[:, -1].argmax(-1)
