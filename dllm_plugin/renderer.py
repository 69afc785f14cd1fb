"""The prompt of a request, checked where vLLM renders it: before it keeps anything of the request.

vLLM knows a renderer by the tokenizer mode. Ours is vLLM's own for Hugging Face tokenizers, with the check before it.
"""

from collections.abc import Mapping
from typing import Any

from vllm.renderers.hf import HfRenderer

from dllm_plugin.admission import DiffusionParameterError
from dllm_plugin.messages import shown


class DiffusionRenderer(HfRenderer):
    """Raises DiffusionParameterError for a prompt that the engine's process or the model could not read."""

    def process_for_engine(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        check_prompt(prompt, self.model_config.get_vocab_size())
        return super().process_for_engine(prompt, *args, **kwargs)

    async def process_for_engine_async(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        check_prompt(prompt, self.model_config.get_vocab_size())
        return await super().process_for_engine_async(prompt, *args, **kwargs)


def check_prompt(prompt: Mapping[str, Any], vocab_size: int) -> None:
    """Raise DiffusionParameterError unless token ids are a list of int in [0, ``vocab_size``) and the salt is a text."""
    token_ids, salt = prompt.get("prompt_token_ids", []), prompt.get("cache_salt")
    if not isinstance(token_ids, list):
        raise DiffusionParameterError(
            f"prompt_token_ids must be a list of integers, got {shown(token_ids)} of type {type(token_ids).__name__}; "
            "write list(...), or array.tolist() for an array"
        )
    # a bool is an int to Python, and none to the engine's process
    if wrong := [token for token in token_ids if type(token) is not int]:
        raise DiffusionParameterError(
            f"prompt_token_ids must be a list of integers, got {shown(wrong[0])} in it; write int(...), for a NumPy array "
            "array.tolist(), and give each prompt of several its own dict"
        )
    if outside := [token for token in token_ids if not 0 <= token < vocab_size]:
        raise DiffusionParameterError(
            f"prompt_token_ids must be at least 0 and below the vocabulary's size {vocab_size}, got {shown(outside[0])}; take "
            "the ids from the model's own tokenizer"
        )
    if not isinstance(salt, str | None):
        raise DiffusionParameterError(f"cache_salt must be a text, got {shown(salt)}; leave it out")
