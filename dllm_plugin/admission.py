"""What a request may ask for, checked when it is admitted: a ValueError offline, HTTP 400 online."""

import copyreg
import functools
from abc import ABCMeta
from typing import Any, NoReturn, cast

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from dllm_plugin.compat import V2LogitsProcessor
from dllm_plugin.extras import check_request
from dllm_plugin.messages import shown
from dllm_plugin.params import MOST
from dllm_plugin.settings import EngineSettings


class DiffusionParameterError(VLLMValidationError, ValueError):
    """A request asks for what a diffusion model cannot do: a ValueError offline, HTTP 400 online."""


class _Refusal(ValueError):
    """Carries a DiffusionParameterError past vLLM, which replaces a ValueError of ``validate_params``.

    vLLM 0.32 and 0.33 do ``except ValueError as e: raise VLLMValidationError(str(e))``, and that is no ValueError any
    more. The error raised by ``str(e)`` takes its place.
    """

    def __str__(self) -> str:
        raise DiffusionParameterError(self.args[0]) from None


SEED_LIMIT = 2**63  # that of HTTP requests; the seeds of further completions, seed + 1 and on, must travel too

# SamplingParams attribute, its neutral values, and what a user can do instead
UNSUPPORTED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("prompt_logprob_token_ids", (), "leave it out"),
    ("thinking_token_budget", (None,), "leave it out"),
    ("watermarking", (None, False), "leave it out"),
    ("trace_decode_token_ids", (None, []), "leave it out"),
)


class _AdmissionType(ABCMeta):
    """The type of `DiffusionAdmission` and of the classes `admission_for` makes, which travel as their settings."""

    settings: EngineSettings


class DiffusionAdmission(LogitsProcessor, V2LogitsProcessor, metaclass=_AdmissionType):
    """Only its ``validate_params`` is used: vLLM calls it for every request, in the front end.

    vLLM has two loaders for these classes, each asking for its own base class; an instance is never made. What vLLM asks is
    a class, so each engine has one of its own (`admission_for`).
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise DiffusionParameterError, naming rule, value and remedy, for what a diffusion model cannot do."""
        try:
            check_sampling_params(sampling_params, cls.settings)
        except ValueError as error:
            raise _Refusal(str(error)) from None

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} checks requests and is never instantiated")

    is_argmax_invariant = update_state = apply = __init__


@functools.cache
def admission_for(settings: EngineSettings) -> type[DiffusionAdmission]:
    """The class that checks the requests to an engine of these settings."""
    made = _AdmissionType("DiffusionAdmission", (DiffusionAdmission,), {"settings": settings, "__module__": __name__})
    return cast(type[DiffusionAdmission], made)


copyreg.pickle(
    _AdmissionType, lambda cls: (admission_for, (cls.settings,)) if "settings" in vars(cls) else cls.__name__
)


def check_sampling_params(sampling_params: SamplingParams, settings: EngineSettings) -> None:
    """Raise ValueError for a sampling parameter or an extra that a diffusion model cannot honour."""
    seed = sampling_params.seed
    if seed is not None and not (type(seed) is int and -SEED_LIMIT <= seed < SEED_LIMIT):
        raise ValueError(
            f"seed must be an integer of at most 64 bits, got {shown(seed)}; leave it out for a random one"
        )
    for name, neutral, remedy in UNSUPPORTED:
        value = getattr(sampling_params, name, None)
        if value is not None and value not in neutral:
            raise ValueError(f"{name} is not supported with diffusion language models, got {shown(value)}; {remedy}")
    if is_step_of_beam_search(sampling_params):
        raise ValueError(
            "beam search is not supported with diffusion language models: a beam grows from left to right, one token a "
            "request; ask for n samples with logprobs, and take the best"
        )
    check_fields(sampling_params)
    extras, max_tokens = sampling_params.extra_args, sampling_params.max_tokens
    if sampling_params.structured_outputs is not None and isinstance(extras, dict) and extras.get("diffusion_template"):
        raise ValueError(
            f"structured_outputs and diffusion_template={shown(extras['diffusion_template'])} exclude each other: a grammar "
            "takes tokens from the first one on, and a template pins later ones; leave one of them out"
        )
    check_request(extras, max_tokens, settings.vocab_size, settings.max_model_len, settings.defaults, settings.profiles)
    check_likelihood(sampling_params, settings)
    try:  # extras of others, and what was set on the object after vLLM had checked it
        msgspec.msgpack.decode(msgspec.msgpack.encode(sampling_params), type=SamplingParams)
    except Exception as error:
        raise ValueError(
            f"sampling parameters must be what the engine's process can read: {str(error).rstrip('.')}, with "
            f"extra_args={shown(extras)}; make them anew, of plain Python values"
        ) from error


def check_likelihood(sampling_params: SamplingParams, settings: EngineSettings) -> None:
    """Raise ValueError where the log-probabilities of the prompt cannot be those that the request's decoding goes by."""
    asked = sampling_params.prompt_logprobs
    if asked is None:
        return
    params = settings.params_of(sampling_params.extra_args)
    if params.strategy == "d2f":
        raise ValueError(
            "prompt_logprobs are of full or block-causal attention, got diffusion_strategy='d2f'; ask with "
            "diffusion_strategy='full', or leave it out"
        )
    if params.cfg_scale > 0:
        raise ValueError(
            f"prompt_logprobs are without guidance, got diffusion_cfg_scale={shown(params.cfg_scale)}; set it to 0.0, or leave "
            "prompt_logprobs out"
        )
    if params.likelihood_samples and asked != 0:
        raise ValueError(
            f"prompt_logprobs must be 0 with diffusion_likelihood_samples={params.likelihood_samples}, because each sample has "
            f"likeliest tokens of its own, got {asked}; set diffusion_likelihood_samples to 0 for the exact chain"
        )


def is_step_of_beam_search(sampling_params: SamplingParams) -> bool:
    """Whether vLLM's beam search asks for the next token of a beam; it sets all of these for each."""
    return (
        sampling_params.watermarking is False
        and sampling_params.max_tokens == 1
        and not sampling_params.detokenize
        and (sampling_params.logprobs or 0) > 0
    )


def check_fields(sampling_params: SamplingParams) -> None:
    """Raise ValueError for a field whose value is not of the type that vLLM declares, as an engine process reads it.

    vLLM checks some types only there, in a thread that ends with the first request it cannot read: no request is then
    answered any more. The rule is the same where the engine runs in the calling process.
    """
    for name, (kind, reader) in _READERS.items():
        value = getattr(sampling_params, name)
        try:
            # a mapping would be read as the object that it describes, which in the calling process it is not
            right = isinstance(reader.decode(msgspec.msgpack.encode(value)), dict) == isinstance(value, dict)
        except Exception:  # a value's own code may raise anything while it is encoded; all of it means the same
            right = False
        if not right:
            remedy = "value.item(), not NumPy's" if hasattr(value, "item") else "a plain Python value of that type"
            raise ValueError(f"{name} must be {kind}, got {shown(value)}; give {remedy}")
        if kind == "float" and not abs(value) <= MOST:  # a device holds it as float32
            raise ValueError(f"{name} must be a finite number of at most {MOST}, got {shown(value)}; leave it out")


_READERS = {
    field.name: (
        field.type.__name__ if isinstance(field.type, type) else field.type,
        msgspec.msgpack.Decoder(field.type),
    )
    for field in msgspec.structs.fields(SamplingParams)
    if field.name != "extra_args"  # `check_request` knows our extras in more detail
}
