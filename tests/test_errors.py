"""What a request is refused for, in which words, and that the engine goes on serving.

An error names the rule, the value and a remedy, at admission. test_engine_configs.py and test_broken_checkpoints.py have what an
engine is refused for.
"""

import pickle
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from support.cases import PolicyCase, difference, random_prompt
from support.engines import core, drive, engine, scheduler
from support.errors import PROMPT, engine_with, serves
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import Request, RequestStatus

from dllm_plugin import admission, front_end
from dllm_plugin.params import DiffusionParams
from dllm_plugin.settings import EngineSettings

SETTINGS = EngineSettings("LLaDAModelLM", DiffusionParams(), 331, 512, 2048, -1, True)
check = partial(admission.check_sampling_params, settings=SETTINGS)


@pytest.mark.parametrize(
    "extras, max_tokens, message",
    [
        ({"diffusion_steps": 0}, 16, "diffusion_steps must be an integer of at least 1, got 0"),
        ({"diffusion_steps": "64"}, 16, "diffusion_steps must be an integer of at least 1, got '64'"),
        ({"diffusion_steps": True}, 16, "got True"),
        ({"diffusion_alg_temp": float("nan")}, 16, "diffusion_alg_temp must be a finite number of at least 0, got nan"),
        ({"diffusion_eps": 1.0}, 16, "diffusion_eps must be a finite number in [0, 1), got 1.0"),
        ({"diffusion_remasking": "entropie"}, 16, "diffusion_remasking must be one of"),
        ({"diffusion_cache": "full"}, 16, "diffusion_cache must be one of"),
        ({"diffusion_step": 8}, 16, "did you mean 'diffusion_steps'?"),
        ({"steps": 8}, 16, "did you mean 'diffusion_steps'?"),
        ({"diffusion_steps": 2, "diffusion_block_length": 4}, 16, "raise diffusion_steps to 4"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_wrong_extras(extras, max_tokens, message):
    llm = engine("llada")
    params = SamplingParams(max_tokens=max_tokens, extra_args=extras)
    with pytest.raises(ValueError, match=re.escape(message)):
        llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    serves(llm)


# Every row of the table, with a value that is not neutral.
UNSUPPORTED = {
    "prompt_logprob_token_ids": [[1, 2]],
    "thinking_token_budget": 4,
    "watermarking": True,
    "trace_decode_token_ids": [3],
}


def test_every_unsupported_parameter_has_a_value_here():
    assert set(UNSUPPORTED) == {name for name, _, _ in admission.UNSUPPORTED}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_sampling_parameters(name):
    params = SamplingParams(temperature=1.0, max_tokens=8, **{name: UNSUPPORTED[name]})
    with pytest.raises(ValueError) as error:
        check(params)
    rule, _, remedy = next(row for row in admission.UNSUPPORTED if row[0] == name)
    assert str(error.value).startswith(f"{rule} is not supported with diffusion language models, got ")
    assert str(error.value).endswith(remedy)


@pytest.mark.parametrize("name", ["watermarking", "thinking_token_budget"])
def test_unsupported_sampling_parameters_in_the_engine(name):
    llm = engine("llada")
    params = SamplingParams(temperature=1.0, max_tokens=8, **{name: UNSUPPORTED[name]})
    with pytest.raises(ValueError, match=f"{name} is not supported with diffusion language models"):
        llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    assert not scheduler(llm).requests
    serves(llm)


@pytest.mark.parametrize(
    "name, value",
    [
        ("presence_penalty", 0),
        ("repetition_penalty", 1.0),
        ("min_tokens", 0),
        ("logit_bias", {}),
        ("allowed_token_ids", None),
        ("bad_words", []),
        ("logprobs", None),
    ],
)
def test_neutral_values_are_taken(name, value):
    """Clients send them by habit."""
    check(SamplingParams(max_tokens=4, **{name: value}))


@pytest.mark.parametrize(
    ("prompt_logprobs", "extras", "message"),
    [
        (0, {"strategy": "d2f"}, "got diffusion_strategy='d2f'; ask with diffusion_strategy='full'"),
        (0, {"cfg_scale": 1.5}, "got diffusion_cfg_scale=1.5; set it to 0.0"),
        (1, {"likelihood_samples": 4}, "prompt_logprobs must be 0 with diffusion_likelihood_samples=4"),
    ],
)
def test_likelihoods_that_are_not_told(prompt_logprobs, extras, message):
    extras = {f"diffusion_{name}": value for name, value in extras.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        check(SamplingParams(max_tokens=4, prompt_logprobs=prompt_logprobs, extra_args=extras))
    check(SamplingParams(max_tokens=4, extra_args=extras))


def test_every_sampling_parameter_of_vllm_is_known():
    """What vLLM lets a request ask for is served, refused, or has no bearing; nothing is dropped without a word."""
    served = {
        "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "detokenize",
        "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind", "n",
        "stream_interval", "repetition_detection", "extra_args", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "min_tokens", "logit_bias", "allowed_token_ids", "bad_words", "logprobs", "logprob_token_ids",
        "flat_logprobs", "structured_outputs", "prompt_logprobs",
    }  # fmt: skip
    no_bearing = {
        "skip_clone", "output_text_buffer_length", "skip_reading_prefix_cache", "routed_experts_prompt_start",
        "prompt_logprob_start",  # of prompt_logprob_token_ids, which are refused
    }  # fmt: skip
    refused = {name for name, _, _ in admission.UNSUPPORTED}
    names = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert names - served - no_bearing - refused == set()


@pytest.mark.parametrize(
    "extras",
    [
        {"diffusion_cfg_scale": 1e300},
        {"diffusion_cfg_scale": 1e38},
        {"diffusion_alg_temp": 1e300, "diffusion_remasking": "maskgit_plus"},
        {"diffusion_factor": 1e300, "diffusion_remasking": "low_confidence"},
    ],
    ids=str,
)
def test_values_beyond_what_the_device_holds_are_refused(extras):
    with pytest.raises(ValueError, match=next(iter(extras))):
        check(SamplingParams(max_tokens=8, extra_args=extras))


@pytest.mark.parametrize(
    "extras",
    [
        {"diffusion_alg_temp": 1e-300, "diffusion_remasking": "entropy"},
        {"diffusion_alg_temp": 1e-40, "diffusion_remasking": "topk_margin"},
        {"diffusion_eps": 1 - 1e-12, "diffusion_remasking": "origin"},
        {"diffusion_steps": 1_000_000, "diffusion_remasking": "low_confidence"},
    ],
    ids=str,
)
def test_extreme_values_do_no_harm(extras):
    """The request ends with tokens of the vocabulary; others are served as ever."""
    llm, case = engine_with("llada"), PolicyCase("llada", "entropy", 8, prompt=6)
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=8, ignore_eos=True, detokenize=False, extra_args=extras)
    outputs, _ = drive(llm, [(PROMPT, params), case.request])
    tokens = outputs[0].outputs[0].token_ids
    assert len(tokens) == 8 and all(0 <= token < 331 and token != 325 for token in tokens)
    assert not difference(case, outputs[1])


def long_prompt(llm, room):
    """Token ids that leave so many places of the longest sequence."""
    return random_prompt(llm.model_config.max_model_len - room, "long")


TOGETHER = {
    "suffix": (50, {"diffusion_suffix": [5] * 100}, {}, "100 of diffusion_suffix and 0 of diffusion_template leave no room"),
    "suffix-that-leaves-no-place": (50, {"diffusion_suffix": [5] * 50}, {}, "leave no room; shorten one of them"),
    "template": (50, {"diffusion_template": [-1] * 51}, {"max_tokens": 60}, "and 51 of diffusion_template leave no room"),
    "longest-suffix": (50, {"diffusion_suffix": [5] * 5000}, {}, "must fit max_model_len {}, got 5000 token ids"),
    "priority": (50, {}, {"priority": "x"}, "priority must be an integer, got 'x'; leave it out"),
    "session": (50, {}, {"resumable": True}, "a session of streamed prompts is not supported"),
    "text": (50, {"diffusion_suffix": "no more"}, {}, "needs a tokenizer, and skip_tokenizer_init is set; give token ids"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOGETHER)
def test_what_prompt_and_parameters_tell_together_is_refused(name):
    llm = engine("llada")
    room, extras, more, message = TOGETHER[name]
    settings = {"max_tokens": 1, "detokenize": False, "extra_args": extras}
    settings |= {key: more[key] for key in more.keys() & {"max_tokens"}}
    prompt = {"prompt_token_ids": long_prompt(llm, room)}
    given = {key: more[key] for key in more.keys() - {"max_tokens"}}
    with pytest.raises(ValueError, match=re.escape(message.format(llm.model_config.max_model_len))):
        request(llm, prompt, SamplingParams(**settings), **given)
    assert not scheduler(llm).requests and not llm.llm_engine.output_processor.request_states
    serves(llm)


def request(llm, prompt, params, **given):
    """What the front end hands to the engine."""
    return llm.llm_engine.input_processor.process_inputs("one", prompt, params, ("generate",), **given)


def test_bad_words_without_a_tokenizer_are_refused():
    """vLLM turns them into token ids where it has a tokenizer, and forgets them where it has none."""
    params = SamplingParams(max_tokens=4, detokenize=False, bad_words=["cat"])
    with pytest.raises(
        ValueError, match=r"bad_words need a tokenizer, got \['cat'\], .* give logit_bias for single tokens"
    ):
        request(engine("llada"), {"prompt_token_ids": PROMPT}, params)
    made = request(engine("tiny-llada"), {"prompt_token_ids": PROMPT}, params)
    assert made.sampling_params.bad_words_token_ids


def test_guidance_without_room_is_refused():
    """A guided request forwards two copies of itself."""
    guided, most = DiffusionParams(cfg_scale=1.0), SETTINGS.most_tokens // 2
    assert SETTINGS.answer_limit(guided, 10, 5000, max_model_len=4000, num_suffix=0) == most
    with pytest.raises(ValueError, match=f"must fit {most} tokens .* with guidance half of max_num_batched_tokens"):
        SETTINGS.answer_limit(guided, most, 1, max_model_len=4000, num_suffix=0)


def test_the_text_of_a_suffix_reaches_the_engine_as_token_ids():
    """In the copy of the parameters that vLLM makes; what the user gave stays as it is."""
    llm = engine("tiny-llada")
    params = SamplingParams(max_tokens=4, extra_args={"diffusion_suffix": " and no more", "theirs": 1})
    made = request(llm, {"prompt_token_ids": PROMPT}, params).sampling_params.extra_args
    ids = llm.get_tokenizer().encode(" and no more", add_special_tokens=False)
    assert made == {"diffusion_suffix": ids, "theirs": 1}
    assert params.extra_args == {"diffusion_suffix": " and no more", "theirs": 1}


def test_a_suffix_that_cannot_fit_is_never_tokenized(monkeypatch):
    llm = engine("tiny-llada")
    longest = llm.model_config.max_model_len * llm.get_tokenizer().max_chars_per_token
    monkeypatch.setattr(front_end, "tokenized", lambda *args: pytest.fail("it is tokenized"))
    params = SamplingParams(max_tokens=4, extra_args={"diffusion_suffix": "x" * (longest + 1)})
    with pytest.raises(ValueError, match=f"must fit max_model_len 512, got a text of {longest + 1} characters"):
        request(llm, {"prompt_token_ids": PROMPT}, params)


@pytest.mark.parametrize("letter", ["x", "\U0001f600"], ids=ascii)
def test_a_text_that_takes_long_to_tokenize_is_refused(letter):
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [5])
    most = front_end.LONGEST_TEXT // len(letter.encode())
    assert front_end.tokenized(letter * most, tokenizer) == [5]
    with pytest.raises(ValueError, match=r"must have at most 32768 bytes, got \d+; give its token ids"):
        front_end.tokenized(letter * (most + 1), tokenizer)


def test_what_a_tokenizer_raises_is_told_to_its_caller(monkeypatch):
    def fail(text, tokenizer):
        raise TypeError("no such text")

    llm = engine("tiny-llada")
    monkeypatch.setattr(front_end, "tokenized", fail)
    params = SamplingParams(max_tokens=4, extra_args={"diffusion_suffix": "x"})
    with pytest.raises(TypeError, match="no such text"):
        llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    assert not scheduler(llm).requests and not llm.llm_engine.output_processor.request_states


MADE_ELSEWHERE = {
    "session": lambda llm: [(PROMPT, {}, {"resumable": True})] * 2 + [([0], {}, {})],
    "priority": lambda llm: [(PROMPT, {}, {"priority": "x"})],
    "text": lambda llm: [(PROMPT, {"extra_args": {"diffusion_suffix": "x"}}, {})],
    **{
        f"no-room-for-{tokens}-{kind.name}": lambda llm, tokens=tokens, kind=kind: [
            (long_prompt(llm, 50), {"max_tokens": tokens, "output_kind": kind, "extra_args": {"diffusion_suffix": [5] * 100}}, {})
        ]
        for tokens in (1, 6, 12)  # however soon a canvas of the same length would be full
        for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MADE_ELSEWHERE)
def test_a_request_that_passed_no_front_end_of_ours_ends_alone(name):
    """With an error, and no token of it is given; others are served as ever."""
    llm = engine("llada")
    case = PolicyCase("llada", "low_confidence", 6, prompt=5)
    drive(llm, [case.request])
    first, *rest = (
        Request(
            "odd",
            prompt,
            SamplingParams(temperature=0.0, ignore_eos=True, **{"max_tokens": 4} | settings),
            None,
            **more,
        )
        for prompt, settings, more in MADE_ELSEWHERE[name](llm)
    )
    for one in (first, *rest):
        core(llm).add_request(one)
    outputs, _ = drive(llm, [case.request])
    assert not difference(case, outputs[0])
    assert first.status == RequestStatus.FINISHED_ERROR and not first.output_token_ids
    assert "odd" not in scheduler(llm).requests and "odd" not in scheduler(llm).denoising


def test_the_admission_class_of_an_engine_travels_with_its_settings():
    made = admission.admission_for(SETTINGS)
    assert made.settings is SETTINGS and pickle.loads(pickle.dumps(made)) is made
    assert pickle.loads(pickle.dumps(admission.DiffusionAdmission)) is admission.DiffusionAdmission


def test_admission_knows_the_defaults_of_its_engine():
    """Two steps cannot unmask four blocks; under the engine's strategy d2f, steps are unused."""
    asked = SamplingParams(max_tokens=16, extra_args={"diffusion_steps": 2, "diffusion_block_length": 4})
    admission.check_sampling_params(asked, replace(SETTINGS, defaults=DiffusionParams(strategy="d2f")))
    with pytest.raises(ValueError, match="2 steps cannot unmask 4 blocks"):
        admission.check_sampling_params(asked, SETTINGS)


def test_admission_knows_the_profile_that_a_request_names():
    """Four steps are enough for the canvas of one profile, and not for that of another."""
    exact, balanced = DiffusionParams(profile="exact"), DiffusionParams(profile="balanced", canvas_length=128)
    settings = replace(SETTINGS, defaults=balanced, profiles=(balanced, exact))
    extras = {"diffusion_steps": 4, "diffusion_block_length": 32}
    admission.check_sampling_params(SamplingParams(max_tokens=300, extra_args=extras), settings)
    with pytest.raises(ValueError, match="4 steps cannot unmask 10 blocks"):
        named = SamplingParams(max_tokens=300, extra_args=extras | {"diffusion_profile": "exact"})
        admission.check_sampling_params(named, settings)


@pytest.mark.parametrize("seed", ["a", 1.5])
def test_a_seed_is_a_number(seed):
    llm = engine("llada")
    with pytest.raises(ValueError, match="seed must be an integer"):
        llm.generate([{"prompt_token_ids": PROMPT}], SamplingParams(max_tokens=4, seed=seed), use_tqdm=False)
    serves(llm)


def test_any_top_k_is_taken():
    """Beyond 64 bits vLLM's own messages end."""
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=6, ignore_eos=True, detokenize=False)
    more = SamplingParams(temperature=1.0, seed=1, max_tokens=6, ignore_eos=True, detokenize=False, top_k=2**63)
    for checkpoint in ("llada", "dream"):
        outputs, _ = drive(engine(checkpoint), [(PROMPT, params), (PROMPT, more)])
        assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


@pytest.mark.parametrize("seed", [0, -2, 2**63 - 1, -(2**63)])
def test_any_seed_is_taken(seed):
    params = SamplingParams(temperature=1.0, seed=seed, max_tokens=6, ignore_eos=True, detokenize=False)
    outputs, _ = drive(engine("llada"), [(PROMPT, params), (PROMPT, params)])
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 0.01, 2.0])
def test_temperatures_at_the_edge(temperature):
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=6, ignore_eos=True, detokenize=False)
    for checkpoint in ("llada", "dream"):
        outputs, _ = drive(engine(checkpoint), [(PROMPT, params)])
        assert len(outputs[0].outputs[0].token_ids) == 6
