"""Requests are checked when they arrive, in the process that answers the client: an error there is HTTP 400.

vLLM has a hook for it, `Platform.validate_request`, which is not told of which engine the request is for; and one
process may hold several. So the method that calls the hook is extended instead, which knows.

A program may hand a request to an engine without it (`LLMEngine.add_request` takes an `EngineCoreRequest`). There the
method is extended that an engine core makes a request of its own with: what it raises ends that request alone.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_sparq.attention_backends.choices import asked_for, chosen
from vllm_sparq.attention_backends.engine import PagedEngine, heads_of
from vllm_sparq.config import OptionsError


def check_request(vllm_config: Any, params: Any) -> None:
    """That a request with these parameters can be read as it asks for; requests to other backends are not ours.

    Raises:
        VLLMValidationError: it cannot; with value, rule and remedy. Of anything else vLLM's server makes HTTP 500.
    """
    extra_args = getattr(params, "extra_args", None)  # parameters of pooling have none
    if not extra_args:
        return
    engine = PagedEngine.of(vllm_config)
    if engine is None:
        return
    try:
        chosen(engine, heads_of(vllm_config.model_config, vllm_config.parallel_config), asked_for(extra_args))
    except OptionsError as error:
        raise VLLMValidationError(str(error), parameter="extra_args") from None


def check_all_requests() -> None:
    """Let vLLM's front ends ask `check_request`, and its engine cores; safe to call twice."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    process = InputProcessor.process_inputs
    if hasattr(process, "checks_sparq"):
        return

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        check_request(self.vllm_config, params)
        return process(self, request_id, prompt, params, *args, **kwargs)

    process_inputs.checks_sparq = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]

    preprocess = EngineCore.preprocess_add_request

    @functools.wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        check_request(self.vllm_config, request.sampling_params)
        return preprocess(self, request)

    EngineCore.preprocess_add_request = preprocess_add_request  # type: ignore[method-assign]
