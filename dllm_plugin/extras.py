"""What a request's extras and ``--additional-config`` say of decoding parameters, read and checked. Standard library only."""

import difflib
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from dllm_plugin.messages import shown
from dllm_plugin.params import MOST, NEUTRAL, PREFIX, RULES, DiffusionParams, resolve

ENGINE_WIDE = '--additional-config {"diffusion": ...}'
_KEYS = [PREFIX + name for name in RULES]
_INITIALS = {name[0] for name in (*RULES, PREFIX)}
LONGEST_NAME = 64  # nothing longer is like one of ours
MOST_COMPARED = 16  # extras of others that are compared with ours, which takes some 0.2 ms each


def engine_settings(additional_config: Any) -> Any:
    """What of vLLM's ``additional_config`` is meant for us. Other plugins' keys are left alone, near misses refused."""
    if not isinstance(additional_config, Mapping):
        return {}
    for key, value in additional_config.items():
        ours = key in RULES and not isinstance(value, Mapping)
        if key != "diffusion" and (ours or key.startswith(PREFIX) or _nearest(key, ["diffusion"], cutoff=0.8)):
            raise ValueError(
                f'--additional-config has an unknown key {shown(key)}; engine-wide defaults go into {{"diffusion": {{...}}}}, '
                "without prefix"
            )
    return additional_config.get("diffusion", {})


def check_token_ids(params: DiffusionParams, vocab_size: int, label: str) -> None:
    """Raise ValueError where suffix or template hold what is no token of the model."""
    for name in ("suffix", "template"):
        ids = getattr(params, name)
        if ids and not isinstance(ids, str) and max(ids) >= vocab_size:
            raise ValueError(
                f"{label}{name} must hold token ids below the vocabulary's size {vocab_size}, got {shown(max(ids))}; take the "
                "ids from the model's own tokenizer"
            )


def check_engine_settings(settings: Any) -> dict[str, Any]:
    """Engine-wide settings (``{"steps": 64}``). Raises ValueError for a wrong one."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"{ENGINE_WIDE} must be a mapping of parameter names to values, got {shown(settings)}")
    for name, value in settings.items():
        if name not in RULES:
            raise ValueError(f"{ENGINE_WIDE} has an unknown parameter {shown(name)}{_nearest(name, RULES)}")
        _check(f"{ENGINE_WIDE} {name}", name, value)
    return dict(settings)


def apply_engine_settings(settings: Mapping[str, Any], base: DiffusionParams) -> DiffusionParams:
    """``base`` with the checked engine-wide ``settings``. Raises ValueError where two of them exclude each other."""
    return resolve(base, settings, label=f"{ENGINE_WIDE} ")


def parse_request(
    extra_args: Mapping[str, Any] | None, defaults: DiffusionParams, profiles: Iterable[DiffusionParams] = ()
) -> DiffusionParams:
    """The parameters of a request: ``defaults``, or the one of the ``profiles`` that it names, with its extras applied.

    A default that contradicts an extra gives way to it. Raises ValueError for a wrong extra, or two that exclude each other.
    """
    return _resolve_request(_given(extra_args), defaults, profiles)


def check_request(
    extra_args: Mapping[str, Any] | None,
    max_tokens: int | None,
    vocab_size: int,
    max_model_len: int,
    defaults: DiffusionParams = NEUTRAL,
    profiles: Iterable[DiffusionParams] = (),
) -> None:
    """Raise ValueError where a request's extras are wrong in themselves, for the model, or cannot hold together."""
    given = _given(extra_args, longest=max_model_len)
    params = _resolve_request(given, defaults, profiles)
    if params.template and max_tokens is not None and len(params.template) > max_tokens:
        raise ValueError(
            f"max_tokens must hold the whole diffusion_template, which has {len(params.template)} positions, got "
            f"{max_tokens}; raise max_tokens"
        )
    check_token_ids(params, vocab_size, label=PREFIX)
    steps_are_used = params.threshold is None and params.factor is None and params.strategy == "full"
    steps, block_length = given.get("steps"), given.get("block_length")
    if not steps_are_used or steps is None or block_length is None:
        return  # a default of too few is raised to one a block
    canvas = len(params.template) or min(params.canvas_length, max_tokens or params.canvas_length)
    if canvas >= max_model_len:
        return  # the prompt decides how long it is
    blocks = math.ceil(canvas / block_length)
    if steps < blocks:
        raise ValueError(
            f"diffusion_steps must be at least the number of blocks, one step a block: {steps} steps cannot "
            f"unmask {blocks} blocks of {block_length} positions (canvas of {canvas}); raise diffusion_steps "
            f"to {blocks} or diffusion_block_length to {math.ceil(canvas / steps)}"
        )


def _resolve_request(
    given: Mapping[str, Any], defaults: DiffusionParams, profiles: Iterable[DiffusionParams]
) -> DiffusionParams:
    base = next((each for each in profiles if each.profile == given.get("profile")), defaults)
    return resolve(base, given, label=PREFIX)


def _given(extra_args: Mapping[str, Any] | None, longest: int = MOST) -> dict[str, Any]:
    """The extras meant for us, without prefix. Extras that are someone else's are left alone.

    ``longest``: token ids that a list may hold.
    """
    given: dict[str, Any] = {}
    if not isinstance(extra_args, Mapping | None) or not all(isinstance(key, str) for key in extra_args or ()):
        raise ValueError(
            f"extra_args must be a mapping of parameter names to values, got {shown(extra_args)}; give it as "
            '{"diffusion_steps": 64}'
        )
    num_compared = 0
    for key, value in (extra_args or {}).items():
        name = key.removeprefix(PREFIX)
        if key.startswith(PREFIX) and name in RULES:
            if isinstance(value, list | tuple) and len(value) > longest:
                raise ValueError(f"{key} must fit max_model_len {longest}, got {len(value)} token ids; shorten it")
            _check(key, name, value)
            given[name] = value
            continue
        is_wrong = key[: len(PREFIX)].lower().startswith("diffusion")
        if not is_wrong and key[:1].lower() in _INITIALS and num_compared < MOST_COMPARED:
            num_compared += 1
            is_wrong = _nearest(key, [*RULES, *_KEYS], cutoff=0.85) != ""
        if is_wrong:
            raise ValueError(
                f"unknown diffusion parameter {shown(key)}{_nearest(key, _KEYS)}; known: {', '.join(_KEYS)}"
            )
    return given


def _check(label: str, name: str, value: Any) -> None:
    if not RULES[name].accepts(value):
        raise ValueError(f"{label} must be {RULES[name]}, got {shown(value)}; {_remedy(name, value)}")


def _remedy(name: str, value: Any) -> str:
    """How to put right a value that a rule does not accept: the common slips, else leaving it out."""
    rule = RULES[name]
    number = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) and rule.kind in (int, float):
        with suppress(ValueError):
            number = float(value)
    if isinstance(number, float) and rule.kind is int and number.is_integer():
        number = int(number)
    if rule.accepts(number):
        slip = "without quotes" if isinstance(value, str) else "not NumPy's"
        return f"write {shown(number)}, {'without a fraction' if type(value) is float else slip}"
    if isinstance(value, str) and rule.choices and (near := _nearest(value, rule.choices, cutoff=0.6)):
        return f"take one of them{near}"
    if type(number) in (int, float) and number > MOST == rule.high:
        return f"nothing is above {MOST}"
    default = getattr(NEUTRAL, name)
    return "leave it out" if default in (None, ()) else f"leave it out for the default {shown(default)}"


def _nearest(name: str, known: Iterable[str], cutoff: float = 0.0) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name; empty where none is as near as ``cutoff``."""
    match = (
        difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=cutoff) if len(name) <= LONGEST_NAME else []
    )
    return f" (did you mean {shown(match[0])}?)" if match else ""
