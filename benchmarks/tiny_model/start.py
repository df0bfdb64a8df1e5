"""The structured start: weights that hold an induction circuit before the first step.

From plain random weights a model of this size found no induction within minutes of CPU time. So training begins with
the circuit laid out, and everything trains freely from there:

- Embeddings share one constant direction c; the rest of each is a random code in the subspace of tokens.
- Layer 0, group 0: the heads read nothing but c for queries and keys, rotated so that RoPE peaks at the tokens 1, 2, 3
  and 4 places back, and write codes of those tokens into one subspace each ("previous-token heads").
- Layer 1: keys hold the codes of the tokens [s-1 .. s-4], queries those of [t .. t-3], in the dimension pairs that
  RoPE hardly turns; values hold the code of token s, written towards its tied embedding.
- All other weights are random; other o_proj and down_proj weights begin at a tenth of their usual scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparq.benchmarks.tiny_model.model import Config, parameter_shapes, rope_frequencies

CODE_SIZES = (60, 24, 24, 24)  # dimensions for the codes of the tokens 1, 2, 3, 4 places back
N_FAST_PAIRS = 12  # pairs that tell neighbouring positions apart
FIRST_SLOW_PAIR = 19  # from here on RoPE turns by about a radian at most over 4,096 positions
CONSTANT_LENGTH, TOKEN_LENGTH = math.sqrt(0.3), math.sqrt(0.7)  # the parts of an embedding, which has length 1
USUAL_SCALE = 0.02  # standard deviation of random weights


@dataclass(frozen=True, kw_only=True)
class Gains:
    """Strengths of the circuit, found by trying."""

    position: float = 10.0  # attention score of a previous-token head, per dimension pair
    first_code: float = 0.6  # length of the written code of the token before, embeddings having length 1
    other_codes: float = 0.4  # the same for the tokens before that
    match: float = 5.0  # attention score in layer 1 of one matching token
    output: float = 5.0  # what layer 1 writes towards the embedding of token s, in embeddings


def orthonormal(rows: int, columns: int, rng: torch.Generator) -> Tensor:
    """Random orthonormal rows [rows, columns], rows <= columns."""
    basis: Tensor = torch.linalg.qr(torch.randn(columns, columns, generator=rng))[0]
    return basis[:, :rows].T


@dataclass(frozen=True)
class Subspaces:
    """An orthonormal basis of the residual stream, divided up."""

    constant: Tensor  # [hidden]
    codes: tuple[Tensor, ...]  # [CODE_SIZES[i], hidden]: where the code of the token i + 1 places back is kept
    tokens: Tensor  # [n, hidden]: where embeddings differ
    read: Tensor  # [60, hidden]: the directions of `tokens` that codes consist of
    shrink: Tensor  # [24, 60]: from the code of the token before to the smaller codes

    @classmethod
    def draw(cls, hidden: int, rng: torch.Generator) -> Subspaces:
        basis = orthonormal(hidden, hidden, rng)
        constant, *codes, tokens = torch.split(basis, [1, *CODE_SIZES, hidden - 1 - sum(CODE_SIZES)])
        read = orthonormal(CODE_SIZES[0], tokens.shape[0], rng) @ tokens
        return cls(constant[0], tuple(codes), tokens, read, orthonormal(CODE_SIZES[1], CODE_SIZES[0], rng))


@dataclass(frozen=True)
class Source:
    """Where in the residual stream the code of one token is found."""

    read: Tensor  # [24 or 60, hidden]
    length: float  # of the code, embeddings having length 1


def random_parameters(config: Config, rng: torch.Generator) -> dict[str, Tensor]:
    """Norms at 1, matrices random; what is added to the residual stream at a tenth of the usual scale."""
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        if "norm" in name:
            parameters[name] = torch.ones(shape)
        else:
            scale = 0.1 if "o_proj" in name or "down_proj" in name else 1.0
            parameters[name] = torch.randn(shape, generator=rng) * scale * USUAL_SCALE
    return parameters


def previous_token_heads(parameters: dict[str, Tensor], config: Config, space: Subspaces, gains: Gains) -> None:
    """Layer 0, group 0: head h looks h + 1 places back and writes the code of that token."""
    layer, dim = "model.layers.0.self_attn.", config.head_dim
    half = dim // 2
    scale = config.hidden_size**0.5  # RMSNorm brings an embedding of length 1 to this length
    strength = (gains.position * dim**0.5) ** 0.5 / (scale * CONSTANT_LENGTH)
    frequencies = rope_frequencies(config)[:N_FAST_PAIRS]
    key = torch.zeros(dim)
    key[:N_FAST_PAIRS] = strength
    parameters[layer + "k_proj.weight"][:dim] = torch.outer(key, space.constant)
    n_read = space.read.shape[0]
    value_gain = (gains.first_code / (scale * code_length(space))) ** 0.5
    value = parameters[layer + "v_proj.weight"][:dim]
    value.zero_()
    value[:n_read] = value_gain * space.read
    for head, code in enumerate(space.codes):
        rows = slice(head * dim, (head + 1) * dim)
        query = torch.zeros(dim)
        query[:N_FAST_PAIRS] = strength * (frequencies * (head + 1)).cos()
        query[half : half + N_FAST_PAIRS] = -strength * (frequencies * (head + 1)).sin()
        parameters[layer + "q_proj.weight"][rows] = torch.outer(query, space.constant)
        out = torch.zeros(config.hidden_size, dim)
        if head == 0:
            out[:, :n_read] = value_gain * code.T
        else:
            regain = (n_read / code.shape[0]) ** 0.5 * gains.other_codes / gains.first_code
            out[:, :n_read] = value_gain * regain * code.T @ space.shrink
        parameters[layer + "o_proj.weight"][:, rows] = out


def code_length(space: Subspaces) -> float:
    """Length of what `space.read` reads of an embedding of length 1."""
    return TOKEN_LENGTH * math.sqrt(space.read.shape[0] / space.tokens.shape[0])


def matching_heads(
    parameters: dict[str, Tensor], config: Config, space: Subspaces, gains: Gains, rng: torch.Generator
) -> None:
    """Layer 1: head h of a group matches the last h + 1 tokens and writes the code of the token that followed."""
    layer, dim, half = "model.layers.1.self_attn.", config.head_dim, config.head_dim // 2
    slow = torch.cat([torch.arange(FIRST_SLOW_PAIR, half), torch.arange(half + FIRST_SLOW_PAIR, dim)])
    n_groups, n_heads = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    stream = (1 + gains.first_code**2 + 3 * gains.other_codes**2) ** 0.5  # length of the residual stream
    scale = config.hidden_size**0.5 / stream
    strength = (gains.match * dim**0.5) ** 0.5 / scale  # of a query's or a key's part for one token
    output = (gains.output / (scale * n_heads)) ** 0.5
    to_tokens = orthonormal(n_groups * dim, space.tokens.shape[0], rng) @ space.tokens
    # The tokens that a key calls 1 .. 4 places back, where the key finds them and where the query does.
    first, *others = space.codes
    in_key = [Source(first, gains.first_code), *(Source(code, gains.other_codes) for code in others)]
    shrunk = Source(space.shrink @ first, gains.first_code * (CODE_SIZES[1] / CODE_SIZES[0]) ** 0.5)
    in_query = [Source(space.read, code_length(space)), shrunk, *in_key[1:3]]
    for group in range(n_groups):
        # mixes[j] brings the codes of token j to the slow dimensions, at random angles to one another.
        mixes = [orthonormal(size, size, rng)[: len(slow)] for size in CODE_SIZES]
        rows = slice(group * dim, (group + 1) * dim)
        parameters[layer + "k_proj.weight"][rows] = mixed(in_key, mixes, slow, strength, dim)
        parameters[layer + "v_proj.weight"][rows] = output * to_tokens[rows]
        for head in range(n_heads):
            columns = slice((group * n_heads + head) * dim, (group * n_heads + head + 1) * dim)
            query = mixed(in_query[: head + 1], mixes[: head + 1], slow, strength, dim)
            parameters[layer + "q_proj.weight"][columns] = query
            parameters[layer + "o_proj.weight"][:, columns] = output * to_tokens[rows].T


def mixed(sources: list[Source], mixes: list[Tensor], slow: Tensor, strength: float, dim: int) -> Tensor:
    """Projection [dim, hidden] that sums the sources' codes in the `slow` dimensions, each with length `strength`."""
    weight = torch.zeros(dim, sources[0].read.shape[1])
    for source, mix in zip(sources, mixes, strict=True):
        kept, size = mix.shape  # a code of 60 dimensions is cut to those there are
        weight[slow[:kept]] += strength / (source.length * (kept / size) ** 0.5) * mix @ source.read
    return weight


def structured_start(config: Config, *, seed: int, gains: Gains | None = None) -> dict[str, Tensor]:
    """Name -> float32 parameter of the model before its first step."""
    gains = gains or Gains()
    rng = torch.Generator().manual_seed(seed)
    parameters = random_parameters(config, rng)
    space = Subspaces.draw(config.hidden_size, rng)
    codes = torch.randn(config.vocab_size, space.tokens.shape[0], generator=rng)
    codes = codes / codes.norm(dim=1, keepdim=True)
    parameters["model.embed_tokens.weight"] = CONSTANT_LENGTH * space.constant + TOKEN_LENGTH * codes @ space.tokens
    previous_token_heads(parameters, config, space, gains)
    matching_heads(parameters, config, space, gains, rng)
    return parameters
