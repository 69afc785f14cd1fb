"""Checkpoints that cannot be served: the start ends with the key or the tensor, the value, and what it must be."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import edit_config, write_checkpoint
from support.engines import engine, model_runner, new_engine
from support.errors import KEPT, PROMPT, chain, engine_with, serves
from transformers import AutoConfig
from vllm.engine.arg_utils import EngineArgs

from dllm_plugin.plugin import register_all

register_all()  # transformers knows our configs before any engine has started


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
