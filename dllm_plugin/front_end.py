"""The last check of a request in vLLM's front end, where its prompt and its parameters are first together.

And what the log of a server says of a request that is refused.
"""

import functools
import logging
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from dllm_plugin.admission import DiffusionParameterError
from dllm_plugin.extras import check_token_ids
from dllm_plugin.messages import shown
from dllm_plugin.params import PREFIX
from dllm_plugin.settings import EngineSettings

LONGEST_TEXT = 32 << 10  # bytes that are tokenized at once: some 30 ms, in which a server does nothing else
# modules of vLLM that write a traceback for whatever ends a stream
STREAMS = tuple(
    f"vllm.entrypoints.{name}.serving"
    for name in ("openai.completion", "openai.chat_completion", "scale_out.token_in_token_out")
)


@functools.cache
def complete_requests() -> None:
    """Have vLLM's input processor `complete` what it makes of a request to an engine of ours, from now on, once a process.

    Every request passes it, offline and online, before the front end keeps anything of it.
    """
    process_inputs = InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def process_and_complete(self: InputProcessor, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        request = process_inputs(self, *args, **kwargs)
        settings = getattr(self.model_config, "diffusion", None)
        if isinstance(settings, EngineSettings):
            try:
                complete(request, settings, self.model_config.max_model_len, self.tokenizer)
            except ValueError as error:
                raise DiffusionParameterError(str(error)) from None
        return request

    InputProcessor.process_inputs = process_and_complete  # type: ignore[method-assign]  # that is the seam
    for name in STREAMS:
        logging.getLogger(name).addFilter(in_one_line)


def in_one_line(record: logging.LogRecord) -> bool:
    """Leave the traceback out where the error is a client's mistake, and say the mistake."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, VLLMClientError):
        record.msg, record.args = f"{record.getMessage()} {' '.join(str(error).split())}", ()
        record.exc_info, record.levelno, record.levelname = None, logging.WARNING, "WARNING"
    return True


def complete(
    request: EngineCoreRequest, settings: EngineSettings, max_model_len: int, tokenizer: TokenizerLike | None
) -> None:
    """Put token ids in the place of a suffix that is a text, and add the end of turn to what ends an answer where it would be
    seen. Raises ValueError for a request that the engine cannot serve.
    """
    if request.resumable:
        raise ValueError("a session of streamed prompts is not supported; send one prompt a request")
    if type(request.priority) is not int:  # an engine process could not read it, nor a queue compare it
        raise ValueError(f"priority must be an integer, got {shown(request.priority)}; leave it out")
    sampling, prompt = request.sampling_params, request.prompt_token_ids
    assert sampling is not None and sampling.max_tokens is not None and prompt is not None  # vLLM has filled them in
    if sampling.bad_words and tokenizer is None:
        raise ValueError(
            f"bad_words need a tokenizer, got {shown(sampling.bad_words)}, and skip_tokenizer_init is set; leave one of them "
            "out, or give logit_bias for single tokens"
        )
    if not sampling.skip_special_tokens and settings.turn_end_token_id >= 0:
        # models write it before EOS; a parser of tools or reasoning has special tokens shown, and would hand it on as content
        sampling.update_from_generation_config({"eos_token_id": settings.turn_end_token_id}, sampling.eos_token_id)
    params = settings.params_of(sampling.extra_args)
    room = functools.partial(settings.answer_limit, params, len(prompt), sampling.max_tokens, max_model_len)
    if isinstance(text := params.suffix, str):
        if tokenizer is None:
            raise ValueError(
                f"{PREFIX}suffix as text needs a tokenizer, and skip_tokenizer_init is set; give token ids"
            )
        if len(text) > max_model_len * tokenizer.max_chars_per_token:
            raise ValueError(
                f"{PREFIX}suffix must fit max_model_len {max_model_len}, got a text of {len(text)} characters; shorten it"
            )
        suffix = tokenized(text, tokenizer)
        check_token_ids(replace(params, suffix=tuple(suffix)), settings.vocab_size, label=PREFIX)
        sampling.extra_args = {**(sampling.extra_args or {}), f"{PREFIX}suffix": suffix}  # of vLLM's own copy
        room(num_suffix=len(suffix))
    else:
        room(num_suffix=len(params.suffix))


def tokenized(suffix: str, tokenizer: TokenizerLike) -> list[int]:
    if (size := len(suffix.encode())) > LONGEST_TEXT:
        raise ValueError(
            f"{PREFIX}suffix as text must have at most {LONGEST_TEXT} bytes, got {size}; give its token ids, which POST "
            "/tokenize tells"
        )
    return tokenizer.encode(suffix, add_special_tokens=False)
