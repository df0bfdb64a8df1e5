"""Models of every supported shape and type, and hybrid models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.small_models import gemma3, llama
from tests.engine.support import EXACT, Prompts

pytestmark = pytest.mark.engine

LENGTHS = (1, 100, 128, 129, 300)
# Head size -> query heads, KV heads: MHA, GQA, MQA.
SHAPES = {
    **{32: (8, 2), 48: (4, 2), 80: (4, 4), 96: (8, 2), 112: (4, 1), 128: (4, 2)},
    **{160: (4, 2), 192: (2, 2), 224: (2, 1), 256: (8, 1), 512: (4, 2)},
}
FULL = {"k": 4096, "dense_below": 0}
HALVES: dict[str, tuple[str, dict[str, Any], float]] = {
    # backend, options with which nothing is left out, how near log-probabilities are to dense ones (k4v2: to fp32's)
    "dense": ("CPU_ATTN", {}, 0.06),
    "sparq": ("sparq", FULL, 0.06),
    "quest": ("quest", {**FULL, "dense_layers": 0}, 0.06),
    "streaming": ("streaming", {"budget": 1024, "prefill": "bounded"}, 0.06),
    "k4v2": ("kivi", {"format": "k4v2"}, 1.2),
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A two-layer Llama with random weights wide enough that its answers are not all alike."""

    def build(head_size: int, n_positions: int = 1024) -> Path:
        n_heads, n_kv_heads = SHAPES[head_size]
        return llama(
            tmp_path_factory.mktemp(f"llama{head_size}"),
            seed=head_size,
            hidden_size=256,
            intermediate_size=256,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=head_size,
            vocab_size=512,
            max_position_embeddings=n_positions,
            initializer_range=0.1,
        )

    return build


@pytest.fixture(scope="module")
def token_prompts() -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(3, 512) for _ in range(n)] for n in LENGTHS]


def small(model: Path, **more: Any) -> dict[str, Any]:
    return dict(model=str(model), skip_tokenizer_init=True, max_model_len=1024, kv_cache_memory_bytes=64 << 20, **more)


@pytest.mark.parametrize("head_size", SHAPES)
def test_head_sizes(head_size: int, model_of: Any, token_prompts: list[list[int]], engine: Any) -> None:
    model = model_of(head_size)
    with engine("CPU_ATTN", **small(model)) as llm:
        dense = Prompts.answers(llm, token_prompts)
    with engine("sparq", {**FULL, "ranking": "int4"}, **small(model)) as llm:
        assert Prompts.answers(llm, token_prompts) == dense
    assert len({tuple(answer) for answer in dense}) > 1


@pytest.mark.parametrize("head_size", [48, 512])
def test_codes_of_other_head_sizes(head_size: int, model_of: Any, token_prompts: list[list[int]], engine: Any) -> None:
    """Groups that divide the head as well as the block; alike in any batch, and near what is dense."""
    model = model_of(head_size)
    with engine("CPU_ATTN", **small(model)) as llm:
        dense = Prompts.answers(llm, token_prompts)
    with engine("kivi", **small(model)) as llm:
        together = Prompts.answers(llm, token_prompts)
        assert Prompts.alone(llm, token_prompts) == together
    assert sum(a[0] == b[0] for a, b in zip(together, dense, strict=True)) > len(dense) / 2


def test_blocks_are_longer_where_contexts_may_be(model_of: Any, token_prompts: list[list[int]], engine: Any) -> None:
    model = dict(small(model_of(96, 32768)), max_model_len=32768, kv_cache_memory_bytes=256 << 20)
    found, sizes = [], []
    for backend, more in (("CPU_ATTN", {}), ("sparq", {}), ("sparq", {"block_size": 64}), ("kivi", {})):
        with engine(backend, FULL if backend == "sparq" else {}, **model, **more) as llm:
            sizes.append(llm.llm_engine.vllm_config.cache_config.block_size)
            found.append(Prompts.answers(llm, token_prompts))
    assert sizes[1:] == [256, 64, 128]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types(dtype: str, model_of: Any, token_prompts: list[list[int]], engine: Any) -> None:
    """Probabilities of the first two tokens: one from prefill, one from a decode step.

    Eight bits of mantissa, two layers and different orders of summation leave a few hundredths, and turn a few of V's
    two-bit codes over.
    Of k4v2 in fp32 dense attention has none of the five likeliest tokens.
    """
    from vllm import SamplingParams

    model, found = model_of(128), {}
    requests = [{"prompt_token_ids": prompt} for prompt in token_prompts]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False, logprobs=5)
    for name, (backend, options, _) in {**HALVES, "k4v2, fp32": HALVES["k4v2"]}.items():
        half = "float32" if "fp32" in name else dtype
        with engine(backend, options, **small(model, dtype=half)) as llm:
            found[name] = [output.outputs[0].logprobs for output in llm.generate(requests, params, use_tqdm=False)]
    for name, (_, _, within) in HALVES.items():
        yardstick = found["k4v2, fp32" if name == "k4v2" else "dense"]
        for wanted, mine in zip(yardstick, found[name], strict=True):
            for step in (0, 1):
                common = set(wanted[step]) & set(mine[step])
                assert len(common) >= (4 if within < 1 else 2), name
                assert all(abs(wanted[step][t].logprob - mine[step][t].logprob) < within for t in common), name
                if next(iter(wanted[step])) != next(iter(mine[step])):
                    break  # a tie went the other way: from here on they read different texts


def test_hybrid_model(tmp_path: Path, token_prompts: list[list[int]], engine: Any) -> None:
    """Sliding-window layers stay with vLLM's own backend, full-attention layers are ours, and both say so."""
    gemma3(tmp_path, seed=5, full=[False, False, False, True])
    with engine("CPU_ATTN", **small(tmp_path)) as llm:
        dense = Prompts.answers(llm, token_prompts)
    with engine("sparq", FULL, **small(tmp_path)) as llm:
        assert Prompts.answers(llm, token_prompts) == dense
        (report,) = llm.collective_rpc("attention_report")
    assert [layer["backend"] for layer in report.values()] == ["CPU_ATTN"] * 3 + ["SPARQ"]
    with engine("flexgen", {"format": "int8"}, **small(tmp_path, enable_prefix_caching=True)) as llm:
        eights = [Prompts.answers(llm, token_prompts) for _ in range(2)]
        (report,) = llm.collective_rpc("attention_report")
    assert eights[0] == eights[1]
    assert sum(a[0] == b[0] for a, b in zip(eights[0], dense, strict=True)) > len(dense) / 2
    assert [layer["backend"] for layer in report.values()] == ["CPU_ATTN"] * 3 + ["FLEXGEN"]


def test_dense_layers(
    engine: Any, prompts: Prompts, sparse_alone: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers dense, which an engine refuses, would be dense attention; none is not."""
    monkeypatch.setattr("vllm_sparq.attention_backends.refusals._dense_layer_refusals", lambda *_: [])
    with engine("sparq", {**EXACT["sparse"], "dense_layers": 4}) as llm:
        answers = prompts.answers(llm, prompts.mixed)
    with engine("CPU_ATTN") as llm:
        assert answers == prompts.answers(llm, prompts.mixed)
    assert answers != list(sparse_alone.values())
