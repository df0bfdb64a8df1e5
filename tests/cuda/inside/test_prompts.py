"""A prompt's last token alone in a step: vLLM calls that a decode, and its graph would read it sparsely."""

from __future__ import annotations

from typing import Any

from tests.engine.support import EXACT

CACHED: dict[str, Any] = dict(enable_prefix_caching=True, block_size=128, max_model_len=1024)


def first_logprobs(llm: Any, prompt: list[int]) -> dict[int, float]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, detokenize=False)
    (found,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return {token: round(entry.logprob, 3) for token, entry in found.outputs[0].logprobs[0].items()}


def test_the_same_from_cached_blocks(engine: Any, prompts: Any) -> None:
    """All but one token of it are cached the second time."""
    prompt = prompts.of_length(257)
    with engine("sparq", EXACT["sparse"], **CACHED) as llm:
        cold, warm = first_logprobs(llm, prompt), first_logprobs(llm, prompt)
    assert warm == cold


def test_beside_decodes(engine: Any, prompts: Any) -> None:
    """Three requests in a graph for four, one of them a prompt of which a token is left."""
    others, prompt = [prompts.of_length(200), prompts.of_length(300)], prompts.of_length(129)
    with engine("sparq", EXACT["sparse"], **CACHED) as llm:
        alone = prompts.answers(llm, [prompt], 8)
        core = llm.llm_engine
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
        for i, other in enumerate(others):
            core.add_request(str(i), {"prompt_token_ids": other}, params)
        for _ in range(6):
            core.step()
        core.add_request("late", {"prompt_token_ids": prompt}, params.clone())
        found = {}
        while core.has_unfinished_requests():
            found |= {out.request_id: out for out in core.step() if out.finished}
    assert found["late"].num_cached_tokens == 128
    assert list(found["late"].outputs[0].token_ids)[:8] == alone[0]
