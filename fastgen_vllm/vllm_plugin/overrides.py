"""What one request asks of FastGen: checked where it enters, read where it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from fastgen_vllm.config import FastGenConfig, RequestOverride
from fastgen_vllm.errors import FastGenConfigError
from fastgen_vllm.policy.protect import SystemPrompts
from fastgen_vllm.vllm_plugin.names import LOGGER
from fastgen_vllm.vllm_plugin.settings import chosen, fastgen_config

logger = init_logger(LOGGER)

KEEP_ALL = RequestOverride(fastgen_compress=False)


def process_inputs(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps ``InputProcessor.process_inputs``, which every request of an engine passes and which
    knows that engine's configuration.

    Raises:
        VLLMValidationError: this engine's FastGen cannot serve the request (HTTP 400).
    """
    request = original(processor, *args, **kwargs)
    if chosen(processor.vllm_config):
        if request.resumable:
            raise VLLMValidationError(
                "the FASTGEN attention backend does not support streaming-input sessions: it "
                "cannot add to a prompt that it has compressed; send each turn as a request"
            )
        try:
            _check(processor, request)
        except FastGenConfigError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    return request


def _check(processor: Any, request: Any) -> None:
    override = _read(fastgen_config(processor.vllm_config), request.sampling_params)
    if override.fastgen_protect == "system":
        SystemPrompts.of(processor.get_tokenizer()).check("request.fastgen_protect", "system")
    n = len(request.prompt_token_ids)
    for first, end in override.spans:
        if end > n:
            raise FastGenConfigError(
                f"request.fastgen_protect: [{first}, {end}] goes beyond the prompt's {n} tokens; "
                "count tokens, with those of the chat template"
            )


def _read(config: FastGenConfig, sampling_params: Any) -> RequestOverride:
    override = RequestOverride.from_extra_args(getattr(sampling_params, "extra_args", None))
    config.check_override(override)
    return override


def decodes(sampling_params: Any) -> bool:
    """Whether the request reads its KV cache after its prompt. One for a single token does not,
    as each of beam search's, so there is nothing to gain from compressing it."""
    return sampling_params is None or sampling_params.max_tokens != 1


def override_of(config: FastGenConfig, sampling_params: Any) -> RequestOverride:
    """The request's override, or the engine's settings where it came in unchecked and is wrong."""
    if not decodes(sampling_params):
        return KEEP_ALL
    try:
        return _read(config, sampling_params)
    except FastGenConfigError as error:
        logger.warning_once("FASTGEN: a request takes the engine's settings: %s", str(error))
        return RequestOverride()
