"""What is refused, in which words, and that the engine goes on serving.

An error names the rule, the value and a remedy. Requests are refused at admission, engines at start-up.
"""

import json
import math
import pickle
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cases import PolicyCase, difference, random_prompt
from support.checkpoints import edit_config, folder, write_checkpoint
from support.engines import core, drive, engine, model_runner, new_engine, num_forwards, scheduler
from transformers import AutoConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import Request, RequestStatus

from dllm_plugin import admission, engine_config, front_end
from dllm_plugin.families import ARCHITECTURES, family_of
from dllm_plugin.params import DiffusionParams
from dllm_plugin.settings import EngineSettings

PROMPT = [11, 12, 13]
SETTINGS = EngineSettings("LLaDAModelLM", DiffusionParams(), 331, 512, 2048, -1, True)
check = partial(admission.check_sampling_params, settings=SETTINGS)
KEPT: list = []  # closing an engine takes vLLM's process groups from the others


def engine_with(checkpoint, **settings):
    llm = new_engine(folder(checkpoint), **settings)
    KEPT.append(llm)
    return llm


def chain(error):
    """An exception's text with that of everything that led to it."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def serves(llm, checkpoint="llada"):
    """The engine still gives the reference's answer, and holds nothing back."""
    case = PolicyCase(checkpoint, "low_confidence", 6, prompt=5)
    output = llm.generate([{"prompt_token_ids": case.prompt_ids}], case.sampling_params, use_tqdm=False)[0]
    assert not difference(case, output)
    assert not scheduler(llm).requests and not scheduler(llm).denoising


# ---- requests


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


# ---- engine-wide defaults


def test_engine_wide_defaults_are_used():
    settings = {"diffusion": {"steps": 4, "remasking": "entropy", "canvas_length": 12}}
    llm = engine_with("llada", additional_config=settings)
    plain = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    own = SamplingParams(
        temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False, extra_args={"diffusion_steps": 12}
    )
    outputs, _ = drive(llm, [(PROMPT, plain), (PROMPT, own)])
    cases = [PolicyCase("llada", "entropy", 16, steps=steps, prompt=tuple(PROMPT), canvas=12) for steps in (4, 12)]
    assert [difference(case, output) for case, output in zip(cases, outputs, strict=True)] == ["", ""]
    assert [num_forwards(output) for output in outputs] == [6, 14]


@pytest.mark.parametrize("checkpoint, policy", [("llada", "low_confidence"), ("dream", "origin")])
def test_defaults_of_the_families(checkpoint, policy):
    """A request that says nothing is decoded greedily, as the family's reference does by default."""
    llm = engine(checkpoint)
    case = PolicyCase(checkpoint, policy, 10, prompt=tuple(PROMPT))
    params = llm.get_default_sampling_params()
    params.max_tokens, params.ignore_eos, params.detokenize, params.seed = 10, True, False, case.seed
    assert params.temperature == 0.0
    assert not difference(case, drive(llm, [(PROMPT, params)])[0][0])


@pytest.mark.parametrize(
    "diffusion, message",
    [
        ({"stesp": 4}, "unknown parameter 'stesp' (did you mean 'steps'?)"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        (64, "must be a mapping of parameter names to values, got 64"),
        ({"suffix": [5, 5000]}, "suffix must hold token ids below the vocabulary's size 331, got 5000"),
    ],
)
def test_wrong_engine_wide_defaults_stop_the_start(diffusion, message):
    with pytest.raises(Exception) as error:
        engine_with("llada", additional_config={"diffusion": diffusion})
    assert message in str(error.value)
    serves(engine("llada"))


# ---- engine configurations


def config(**changes):
    """As much of a VllmConfig as the checks read; `a__b` sets b of its part a."""
    settings = {
        "model_config": SimpleNamespace(
            architecture="LLaDAModelLM",
            max_model_len=1000,
            runner_type="generate",
            enable_prompt_embeds=False,
            logits_processors=None,
        ),
        "parallel_config": SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_expert_parallel=False,
            enable_eplb=False,
            expert_placement_strategy="linear",
            data_parallel_size=1,
            tensor_parallel_size=2,
            world_size=1,
            worker_cls="auto",
        ),
        "cache_config": SimpleNamespace(cache_dtype="auto", enable_prefix_caching=False, kv_offloading_size=None),
        "scheduler_config": SimpleNamespace(
            scheduler_cls=None,
            async_scheduling=None,
            max_num_batched_tokens=1000,
            max_num_scheduled_tokens=None,
            prefill_schedule_interval=1,
        ),
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            setattr(settings[part], name, value)
        else:
            settings[part] = value
    return SimpleNamespace(**settings)


REFUSED = {
    "speculative": ({"speculative_config": object()}, "remove --speculative-config"),
    "pipeline": ({"parallel_config__pipeline_parallel_size": 2}, "got pipeline_parallel_size=2; use --tensor-parallel"),
    "decode-context": ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism is not supported"),
    "prefill-context": ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism is not supported"),
    "expert-parallel": (
        {"parallel_config__enable_expert_parallel": True, "parallel_config__data_parallel_size": 3},
        "got data_parallel_size=3, and engines share nothing; remove --enable-expert-parallel",
    ),
    "expert-balancing": ({"parallel_config__enable_eplb": True}, "remove --enable-eplb"),
    "expert-placement": (
        {"parallel_config__expert_placement_strategy": "round_robin"},
        "got expert_placement_strategy='round_robin'; remove --expert-placement-strategy",
    ),
    "kv-cache-dtype": ({"cache_config__cache_dtype": "fp8"}, "got kv_cache_dtype='fp8'; remove --kv-cache-dtype"),
    "prefix-caching": ({"cache_config__enable_prefix_caching": True}, "remove --enable-prefix-caching"),
    "kv-transfer": ({"kv_transfer_config": object()}, "remove --kv-transfer-config"),
    "kv-offloading": ({"cache_config__kv_offloading_size": 1.0}, "remove --kv-offloading-size"),
    "pooling": ({"model_config__runner_type": "pooling"}, "got runner='pooling'; remove --runner"),
    "prompt-embeds": ({"model_config__enable_prompt_embeds": True}, "remove --enable-prompt-embeds"),
    "logits-processors": ({"model_config__logits_processors": ["my:Own"]}, "['my:Own']; remove --logits-processors"),
    "worker": ({"parallel_config__worker_cls": "my.Worker"}, "got worker_cls='my.Worker'; remove --worker-cls"),
    "scheduler": ({"scheduler_config__scheduler_cls": "my.S"}, "got scheduler_cls='my.S'; remove --scheduler-cls"),
    "prefill-interval": (
        {"scheduler_config__prefill_schedule_interval": 2},
        "got prefill_schedule_interval=2; remove --prefill-schedule-interval",
    ),
    "async": ({"scheduler_config__async_scheduling": True}, "remove --async-scheduling"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_configurations(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        engine_config.refuse_what_does_not_fit(config(**changes))
    assert str(error.value).startswith("dllm_plugin: ") and message in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel_config__worker_cls": engine_config.WORKER},
        {"parallel_config__enable_expert_parallel": True},
        {"parallel_config__data_parallel_size": 3},
        {"scheduler_config__scheduler_cls": engine_config.SCHEDULER},
        {"scheduler_config__async_scheduling": False},
        {"model_config__logits_processors": [admission.admission_for(SETTINGS)]},
    ],
    ids=str,
)
def test_configurations_that_fit(changes):
    engine_config.refuse_what_does_not_fit(config(**changes))


@pytest.mark.parametrize("budget, length, most", [(1000, 1000, 2000), (5000, 1000, 5000), (20000, 20000, 20000)])
def test_a_guided_sequence_may_exceed_the_budget(budget, length, most):
    """Up to 8,192 tokens and their copy; above that, half of the budget is for each."""
    parts = {"scheduler_config__max_num_batched_tokens": budget, "model_config__max_model_len": length}
    assert engine_config.most_tokens_of_a_step(config(**parts)) == most


@pytest.mark.parametrize("scheduled, fits", [(None, True), (1000, True), (999, False), (32, False)])
def test_what_is_scheduled_at_once_holds_a_sequence(scheduled, fits):
    """vLLM would leave a longer prompt waiting, and all behind it."""
    vllm_config = config(scheduler_config__max_num_scheduled_tokens=scheduled)
    if fits:
        engine_config.fit_token_budget(vllm_config)
    else:
        with pytest.raises(ValueError, match=f"max_num_scheduled_tokens .* got {scheduled} with max_model_len 1000"):
            engine_config.fit_token_budget(vllm_config)


@pytest.mark.parametrize("budget, fits", [(1000, True), (1001, True), (999, False), (64, False)])
def test_token_budget_holds_a_sequence(budget, fits):
    vllm_config = config(scheduler_config__max_num_batched_tokens=budget)
    if fits:
        engine_config.fit_token_budget(vllm_config)
        assert vllm_config.scheduler_config.max_num_batched_tokens == budget
    else:
        with pytest.raises(ValueError) as error:
            engine_config.fit_token_budget(vllm_config)
        assert f"got {budget} with max_model_len 1000" in str(error.value)
        assert "raise --max-num-batched-tokens to 1000 or lower --max-model-len" in str(error.value)


def test_vllms_own_default_token_budget_is_raised():
    for budget in EngineArgs.get_batch_defaults(1)[0].values():
        vllm_config = config(
            scheduler_config__max_num_batched_tokens=budget, model_config__max_model_len=budget + 1
        )  # fmt: skip
        engine_config.fit_token_budget(vllm_config)
        assert vllm_config.scheduler_config.max_num_batched_tokens == budget + 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_num_batched_tokens": 100}, "got 100 with max_model_len 512; raise --max-num-batched-tokens to 512"),
        ({"async_scheduling": True}, "remove --async-scheduling"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "remove --worker-cls"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "remove --scheduler-cls"),
        ({"kv_cache_dtype": "fp8"}, "remove --kv-cache-dtype"),
        ({"enable_prefix_caching": True}, "remove --enable-prefix-caching"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "remove --speculative-config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_a_real_start(settings, message):
    with pytest.raises(Exception) as error:
        engine_with("llada", **settings)
    assert message in str(error.value)


@pytest.mark.parametrize("settings", [{}, {"enable_prefix_caching": False, "enable_chunked_prefill": True}], ids=str)
def test_prefix_caching_and_chunked_prefill_are_off(settings):
    """Full attention has no prefix that stands for itself: a prompt that comes again is computed again, in one piece."""
    llm = engine_with("llada", **settings)
    vllm_config = llm.llm_engine.vllm_config
    assert not vllm_config.cache_config.enable_prefix_caching
    assert not vllm_config.scheduler_config.enable_chunked_prefill
    case = PolicyCase("llada", "low_confidence", 6, prompt=300)
    for _ in range(2):
        assert not difference(case, drive(llm, [case.request])[0][0])


@pytest.mark.parametrize(
    "settings, wanted",
    [({}, True), ({"enforce_eager": True}, False), ({"compilation_config": {"cudagraph_mode": "NONE"}}, False)],
    ids=str,
)
def test_who_switches_graphs_off_has_none(settings, wanted):
    """vLLM's own are off for everyone, so that its flag would not say any more who asked."""
    model_config = engine_with("llada", **settings).llm_engine.vllm_config.model_config
    assert model_config.enforce_eager
    assert model_config.diffusion.records_graphs is wanted


def test_our_worker_with_another_model():
    """Its scheduler would be vLLM's own: the worker refuses before it loads anything."""
    from dllm_plugin.worker import DiffusionWorker

    with pytest.raises(ValueError) as error:
        DiffusionWorker(SimpleNamespace(model_config=SimpleNamespace(architecture="LlamaForCausalLM")))
    assert "LlamaForCausalLM is not a diffusion language model" in str(error.value)
    assert "serve it without --worker-cls dllm_plugin.worker.DiffusionWorker" in str(error.value)


def test_family_of_names_the_families():
    with pytest.raises(ValueError) as error:
        family_of("GPT2LMHeadModel")
    assert all(name in str(error.value) for name in ARCHITECTURES)


# ---- checkpoints


@pytest.fixture
def broken(request):
    """A copy of a small checkpoint for a test to break, named after the test."""

    def make(family, name):
        settings = {"n_layers": 1} if family == "llada" else {"num_hidden_layers": 1}
        return write_checkpoint(family, f"broken-{family}-{name}", **settings)

    return make


STRUCTURAL = {
    "llada": ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "embedding_size",
              "max_sequence_length", "block_type", "layer_norm_type", "activation_type", "rope", "rope_theta",
              "rms_norm_eps", "weight_tying", "mask_token_id", "eos_token_id"),
    "dream": ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
              "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
              "mask_token_id", "eos_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("family, key", [(family, key) for family, keys in STRUCTURAL.items() for key in keys])
def test_config_without_a_structural_key(broken, family, key):
    folder = broken(family, "config")
    AutoConfig.from_pretrained(folder)
    edit_config(folder, remove=[key])
    with pytest.raises(ValueError) as error:
        AutoConfig.from_pretrained(folder)
    assert f"lacks {key};" in str(error.value)


@pytest.mark.parametrize(
    "family, change",
    [
        ("llada", {"block_type": "sequential"}),
        ("llada", {"layer_norm_type": "low_precision"}),
        ("llada", {"activation_type": "swiglu"}),
        ("llada", {"alibi": True}),
        ("llada", {"include_qkv_bias": True}),
        ("llada", {"scale_logits": True}),
        ("dream", {"hidden_act": "gelu"}),
        ("dream", {"use_sliding_window": True}),
        ("dream", {"rope_scaling": {"factor": 4.0, "type": "yarn"}}),  # as a message shows it: keys in order
    ],
    ids=str,
)
def test_config_of_another_structure(broken, family, change):
    folder = broken(family, "structure")
    edit_config(folder, **change)
    with pytest.raises(ValueError) as error:
        AutoConfig.from_pretrained(folder)
    ((key, value),) = change.items()
    assert f"the config has {key}={value!r}" in str(error.value)


KINDS = [  # a value of another kind, or with which no model can be built
    ("llada", {"n_heads": "4"}, "n_heads must be a positive integer, got '4'"),
    ("llada", {"d_model": True}, "d_model must be a positive integer, got True"),
    ("llada", {"n_heads": 10**6}, "num_attention_heads must divide hidden_size 128, got 1000000"),
    ("llada", {"n_heads": 0}, "n_heads must be a positive integer, got 0"),
    ("llada", {"n_kv_heads": 3}, "num_key_value_heads must divide num_attention_heads 4, got 3"),
    ("llada", {"embedding_size": "331"}, "embedding_size must be a positive integer, got '331'"),
    ("llada", {"max_sequence_length": "64"}, "max_sequence_length must be a positive integer, got '64'"),
    ("llada", {"weight_tying": "yes"}, "weight_tying must be true or false, got 'yes'"),
    ("llada", {"rope_theta": math.inf}, "rope_theta must be a positive number, got inf"),
    ("llada", {"architectures": None}, "config.json must name its architecture"),
    ("llada", {"architectures": "LLaDAModelLM"}, "config.json must name its architecture"),
    ("dream", {"head_dim": "32"}, "head_dim must be a positive integer, got '32'"),
    ("dream", {"num_key_value_heads": 64}, "num_key_value_heads must divide num_attention_heads 4, got 64"),
    ("sdar", {"block_size": "4"}, "block_size must be a positive integer, got '4'"),
    ("llada2", {"num_shared_experts": -1}, "num_shared_experts must be an integer of at least 0, got -1"),
    ("llada2", {"routed_scaling_factor": "2"}, "routed_scaling_factor must be a positive number, got '2'"),
    ("llada2", {"partial_rotary_factor": "0.5"}, "partial_rotary_factor must be a positive number, got '0.5'"),
]


@pytest.mark.parametrize("family, change, message", KINDS, ids=str)
def test_config_values_of_another_kind(family, change, message):
    folder = write_checkpoint(family, f"kind-{family}")
    edit_config(folder, **change)
    with pytest.raises(Exception) as error:
        EngineArgs(model=str(folder), skip_tokenizer_init=True, max_model_len=64).create_engine_config()
    assert message in chain(error.value)


@pytest.mark.parametrize(
    "family, change, message",
    [
        (
            "llada",
            {"eos_token_id": [2, 3]},
            "eos_token_id must be one token id below the vocabulary's size 331, got [2, 3]",
        ),
        ("dream", {"eos_token_id": None}, "eos_token_id must be one token id"),
        ("llada", {"mask_token_id": 331}, "mask_token_id must be one token id"),
        ("dream", {"mask_token_id": -1}, "mask_token_id must be one token id"),
        ("dream", {"rope_theta": "x"}, "rope_theta must be a positive number, got 'x'"),
        ("llada", {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
        ("llada", {"embedding_size": 330}, "embedding_size must be at least vocab_size 331, got 330"),
        ("llada", {"hidden_size": "128"}, "d_model must be a positive integer, got '128'"),
        ("llada", {"activation_type": "gelu"}, "activation_type='gelu'"),
        ("dream", {"use_sliding_window": True}, "use_sliding_window=True"),
        (
            "dream",
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "set rope_theta, and leave rope_parameters",
        ),
        (
            "llada",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}},
            "set rope_theta, and leave rope_parameters",
        ),
    ],
    ids=str,
)
def test_overrides_are_checked_like_the_config(family, change, message):
    """vLLM puts them on the config after it was made; a wrong one would be ignored, or fail in the first request."""
    with pytest.raises(Exception) as error:
        engine_with(family, hf_overrides=change)
    assert message in chain(error.value)


def test_a_plain_rotation_in_the_config_does_not_bind_an_override(broken):
    """transformers saves one beside rope_theta."""
    path = broken("dream", "rotation")
    theta = json.loads((path / "config.json").read_text())["rope_theta"]
    edit_config(path, rope_parameters={"rope_type": "default", "rope_theta": theta})
    llm = new_engine(path, hf_overrides={"rope_theta": theta / 2})
    KEPT.append(llm)
    assert model_runner(llm).model.decoder.shape.rope_theta == theta / 2


def test_a_penalty_of_the_generation_config_is_ignored(broken):
    """Published with a model of the same family that is no diffusion model; a user's own is taken."""
    path = broken("llada", "penalty")
    (path / "generation_config.json").write_text(
        json.dumps({"repetition_penalty": 1.05, "top_p": 0.9, "temperature": 0.5})
    )
    llm = new_engine(path)
    defaults = llm.get_default_sampling_params()
    assert (defaults.repetition_penalty, defaults.top_p, defaults.temperature) == (1.0, 0.9, 0.5)
    assert llm.generate([{"prompt_token_ids": PROMPT}], None, use_tqdm=False)
    KEPT.append(llm)
    KEPT.append(llm := new_engine(path, override_generation_config={"repetition_penalty": 1.2}))
    assert llm.get_default_sampling_params().repetition_penalty == 1.2


def test_config_without_a_structural_key_stops_the_start(broken):
    folder = broken("llada", "start")
    edit_config(folder, remove=["n_kv_heads"])
    with pytest.raises(Exception) as error:
        new_engine(folder)
    assert "n_kv_heads" in chain(error.value)


TENSORS = {
    "llada": ("model.transformer.blocks.0.v_proj.weight", "model.transformer.ff_out.weight"),
    "dream": ("model.layers.0.self_attn.k_proj.bias", "model.norm.weight"),
}


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "shape-of-rows", "integers"])
@pytest.mark.parametrize("family, name", [(family, name) for family, names in TENSORS.items() for name in names])
def test_checkpoint_tensors(broken, family, name, fault):
    """Loaded for real; the error names the tensor."""
    folder = broken(family, "tensors")
    tensors = load_file(folder / "model.safetensors")
    culprit = name
    if fault == "missing":
        del tensors[name]
    elif fault == "surplus":
        culprit = name.replace("0.", "1.") if "0." in name else name.replace(".weight", ".scale")
        tensors[culprit] = torch.zeros(3)
    elif fault == "shape":
        tensors[name] = torch.cat((tensors[name], tensors[name]))
    elif fault == "integers":
        tensors[name] = (127 * tensors[name]).to(torch.int8)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception) as error:
        new_engine(folder)
    assert culprit in chain(error.value)
    serves(engine("llada"))


def test_index_of_a_checkpoint_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LLaDAModelLM"], "model_type": "llada"}))
    with pytest.raises(Exception) as error:
        new_engine(tmp_path)
    assert "d_model" in chain(error.value)
