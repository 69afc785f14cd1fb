"""The adapters of the block-diffusion families: logits against plain models under full and block-causal attention."""

import functools
from collections.abc import Sequence

import pytest
import torch
from reference import block_checkpoints, block_models
from safetensors.torch import load_file, save_file
from support.cases import random_prompt
from support.checkpoints import architecture, edit_config, temporary_folder
from support.engines import model_runner, new_engine
from transformers import AutoConfig, LlamaConfig

from dllm_plugin.attention import WindowBatch
from dllm_plugin.families import ARCHITECTURES
from dllm_plugin.kernels.window_attention import PagedWindows, Windows

# name: (writer, its options)
CHECKPOINTS: dict[str, tuple[str, dict]] = {
    **{writer: (writer, {}) for writer in block_checkpoints.WRITERS},
    "sdar-tied": ("sdar", {"tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 327}),
    "sdar-wide-heads": ("sdar", {"head_dim": 64, "shards": 2}),
    "llada2-merged": (
        "llada2",
        {"merged_experts": True, "num_shared_experts": 2, "first_k_dense_replace": 2, "shards": 3},
    ),
    "llada2-no-shared": ("llada2", {"num_shared_experts": 0, "num_experts_per_tok": 1, "partial_rotary_factor": 0.25}),
    "llada-moe-plain": ("llada-moe", {"qk_layernorm": False, "norm_topk_prob": True, "partial_rotary_factor": 0.5}),
    "sdar-moe-merged": ("sdar-moe", {"merged_experts": True, "norm_topk_prob": False, "num_experts_per_tok": 3}),
}


@functools.cache
def folder(checkpoint):
    writer, options = CHECKPOINTS[checkpoint]
    return block_checkpoints.WRITERS[writer](temporary_folder(f"block-{checkpoint}"), seed=3, **options)


@functools.cache
def engine(checkpoint):
    return new_engine(folder(checkpoint))


@functools.cache
def reference(checkpoint):
    return block_models.load(folder(checkpoint))


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32)


@torch.inference_mode()
def forward(llm, windows: Sequence[tuple[list[int], int]], block: int | None = None):
    """Logits of each window's tokens, a window being its sequence and where it begins, all in one batch.

    Under full attention without a block length, otherwise block-causal, over the engine's pages: the keys of positions
    before a window are those that an earlier call of the same order has left there.
    """
    runner = model_runner(llm)
    lengths = [len(ids) - start for ids, start in windows]
    ids = torch.tensor([token for ids, start in windows for token in ids[start:]])
    positions = torch.cat([torch.arange(start, len(ids)) for ids, start in windows])
    bounds = int32([0, *torch.tensor(lengths).cumsum(0).tolist()])
    ragged = {"query_start_loc": bounds, "max_query_len": max(lengths)}
    if block is None:
        assert not any(start for _, start in windows)
        batch = WindowBatch(len(ids), Windows(**ragged))
    else:
        size, most = runner.batches.page_size, max(len(ids) for ids, _ in windows)
        table = int32(range(len(windows) * -(-most // size))).view(len(windows), -1).flip(1)
        slots = [int(row[i // size]) * size + i % size for row, (ids, start) in zip(table, windows, strict=True)
                 for i in range(start, len(ids))]  # fmt: skip
        paged = PagedWindows(
            **ragged,
            window_start=int32(start for _, start in windows),
            visible=int32(len(ids) for ids, _ in windows),
            prefix_len=int32(0 for _ in windows),
            block_length=int32(block for _ in windows),
            block_table=table,
            max_visible=table.shape[1] * size,
        )
        batch = WindowBatch(0, None, paged, slot_mapping=torch.tensor(slots))
    with runner.attending(batch):
        hidden = runner.model(ids, positions)
    return runner.model.compute_logits(hidden).split(lengths)


def sequences(checkpoint, *lengths):
    """Prompts of these lengths, each with a tail of masks."""
    plain = reference(checkpoint)
    masks = [plain.mask_token_id] * 7
    return [[t % 310 for t in random_prompt(n, f"block-{n}")] + masks for n in lengths]


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_logits_under_full_attention(checkpoint, num_requests):
    plain, all_ids = reference(checkpoint), sequences(checkpoint, 9, 1, 30)[:num_requests]
    for ids, logits in zip(all_ids, forward(engine(checkpoint), [(ids, 0) for ids in all_ids]), strict=True):
        expected = plain.logits(torch.tensor(ids), torch.ones(len(ids), len(ids), dtype=torch.bool))
        assert logits.shape == expected.shape == (len(ids), plain.vocab_size)
        assert (logits - expected).abs().max() <= 1e-4


BLOCKS = [pytest.param(name, block, id=f"{name}-{block}") for name in CHECKPOINTS for block in (4, 8)]


@pytest.mark.parametrize(("checkpoint", "block"), BLOCKS)
def test_logits_under_block_causal_attention(checkpoint, block):
    """In blocks counted from the beginning; whole sequences, then windows over the keys that these have left."""
    plain, all_ids = reference(checkpoint), sequences(checkpoint, 9, 1, 30)
    expected = [plain.logits(torch.tensor(ids), block_models.block_causal(len(ids), block)) for ids in all_ids]
    starts = [0, 0, 0], [block, 0, 4 * block]
    for of_step in starts:
        windows = list(zip(all_ids, of_step, strict=True))
        for logits, want, start in zip(forward(engine(checkpoint), windows, block), expected, of_step, strict=True):
            assert (logits - want[start:]).abs().max() <= 1e-4


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_reference_reads_every_tensor(checkpoint):
    """And so does the engine, which refuses one that it has no place for."""
    plain = reference(checkpoint)
    plain.logits(torch.tensor([1, 2, 3]), torch.ones(3, 3, dtype=torch.bool))
    assert plain.used == set(plain.weights)


def test_the_bias_of_a_router_keeps_float32():
    """In a model of bfloat16, from tensors of either dtype."""
    for name, dtype in (("2.1", torch.float32), ("2.0", torch.bfloat16)):
        path = written("llada2", f"bias-{name}", dtype=torch.bfloat16, expert_bias_dtype=dtype)
        llm = new_engine(path, dtype="bfloat16")
        KEPT.append(llm)
        mlp = model_runner(llm).model.decoder.blocks[1].mlp
        tensor = load_file(path / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"]
        assert mlp.router.expert_bias.dtype == mlp.router.weight.dtype == torch.float32
        assert tensor.dtype == dtype and torch.equal(mlp.router.expert_bias, tensor.float())
        assert mlp.experts.w2_weight.dtype == torch.bfloat16


@torch.inference_mode()
def test_weights_are_reloaded_from_another_folder():
    """As trainers do between rollouts."""
    llm = new_engine(folder("llada2"))
    KEPT.append(llm)
    other = written("llada2", "reload", seed=4)
    (ids,) = sequences("llada2", 9)
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool)
    for path in (other, folder("llada2")):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        want = block_models.load(path).logits(torch.tensor(ids), visible)
        assert (forward(llm, [(ids, 0)])[0] - want).abs().max() <= 1e-4


# ---- how a checkpoint is found, and what its config.json leaves out


KEPT: list = []  # closing an engine takes vLLM's process groups from the others


def config_class(writer):
    return ARCHITECTURES[architecture(writer)].config_class


def written(writer, name, **options):
    return block_checkpoints.WRITERS[writer](temporary_folder(f"block-{name}"), **{"seed": 3} | options)


@pytest.mark.parametrize("writer", block_checkpoints.WRITERS)
def test_config_of_the_architecture(writer):
    """Also where model_type is that of LLaDA, Dream or Llama."""
    config = engine(writer).llm_engine.model_config
    family = ARCHITECTURES[architecture(writer)]
    assert config.architecture == architecture(writer) and config.diffusion.family is family
    assert type(config.hf_config) is type(config.hf_text_config) is family.config_class
    assert type(model_runner(engine(writer)).model).__name__ == family.adapter.rpartition(":")[2]
    plain = reference(writer)
    assert (config.hf_config.mask_token_id, config.hf_config.eos_token_id) == (plain.mask_token_id, plain.eos_token_id)
    assert getattr(config.hf_config, "block_length", None) == plain.block_length
    assert config.get_head_size() == plain.head_dim
    assert (family.attention == "full") == (plain.block_length is None)
    assert family.shifted == bool(plain.shift)


def test_a_stable_diffcoder_that_is_named_a_llama():
    """Its older name, which the user overrides."""
    path = written("stable-diffcoder", "named-llama")
    edit_config(path, architectures=["LlamaForCausalLM"])
    llm = new_engine(path, hf_overrides={"architectures": ["StableDiffcoderForCausalLM"]})
    KEPT.append(llm)
    (ids,) = sequences("stable-diffcoder", 9)
    want = reference("stable-diffcoder").logits(torch.tensor(ids), torch.ones(len(ids), len(ids), dtype=torch.bool))
    assert (forward(llm, [(ids, 0)])[0] - want).abs().max() <= 1e-4


def test_llamas_stay_llamas():
    assert type(AutoConfig.for_model("llama")) is LlamaConfig


LEFT_OUT = {  # mask, EOS, block
    "sdar": (151669, 320, 4),
    "sdar-moe": (151669, 320, 4),
    "llada2": (156895, 156892, 32),
    "fast-dllm-v2": (151665, 320, 32),
    "stable-diffcoder": (5, 320, 4),
    "dream-reasoner": (151669, 320, 32),
    "llada-moe": (156895, 156892, None),
}


@pytest.mark.parametrize("writer", block_checkpoints.WRITERS)
def test_what_config_json_leaves_out(writer):
    path, expected = written(writer, f"left-out-{writer}", num_hidden_layers=1), LEFT_OUT[writer]
    keys = ["mask_token_id", "block_size", "bd_size"] + ["eos_token_id", "pad_token_id"] * (expected[1] != 320)
    edit_config(path, remove=keys)
    config = config_class(writer).from_pretrained(path)
    assert (config.mask_token_id, config.eos_token_id, getattr(config, "block_length", None)) == expected


def test_the_padding_is_llada2s_eos():
    path = written("llada2", "padding", num_hidden_layers=1, eos_token_id=317)
    assert AutoConfig.from_pretrained(path).eos_token_id == 317


@pytest.mark.parametrize("writer", block_checkpoints.WRITERS)
def test_structural_keys_are_required(writer):
    required = config_class(writer).required_keys
    assert {"hidden_size", "rope_theta", "rms_norm_eps", "tie_word_embeddings"} <= set(required)
    for key in required:
        path = written(writer, f"key-{writer}", num_hidden_layers=1)
        edit_config(path, remove=[key])
        with pytest.raises(ValueError, match=f"lacks {key};"):
            config_class(writer).from_pretrained(path)


def test_a_missing_key_of_stable_diffcoder_stops_the_start():
    """Where transformers has made a Llama of it, whose rope_theta is 10000."""
    path = written("stable-diffcoder", "no-theta", num_hidden_layers=1)
    edit_config(path, remove=["rope_theta"])
    with pytest.raises(Exception) as error:
        new_engine(path)
    assert "lacks rope_theta;" in chain(error.value)


OTHER_STRUCTURES = [
    ("sdar", {"attention_bias": True}),
    ("sdar", {"rope_scaling": {"factor": 4.0, "rope_type": "yarn"}}),
    ("sdar-moe", {"mlp_only_layers": [0]}),
    ("sdar-moe", {"decoder_sparse_step": 2}),
    ("llada2", {"norm_head": True}),
    ("llada2", {"score_function": "softmax"}),
    ("llada2", {"use_qkv_bias": True}),
    ("llada2", {"expert_capacity": 48}),
    ("fast-dllm-v2", {"use_sliding_window": True}),
    ("stable-diffcoder", {"mlp_bias": True}),
    ("dream-reasoner", {"hidden_act": "gelu"}),
    ("llada-moe", {"clip_qkv": 8.0}),
    ("llada-moe", {"shared_expert_intermediate_size": 64}),
    ("llada-moe", {"moe_router_enable_expert_bias": True}),
]


@pytest.mark.parametrize(("writer", "change"), OTHER_STRUCTURES, ids=str)
def test_other_structures_are_refused(writer, change):
    path = written(writer, f"structure-{writer}", num_hidden_layers=1)
    edit_config(path, **change)
    ((key, value),) = change.items()
    with pytest.raises(ValueError) as error:
        config_class(writer).from_pretrained(path)
    assert f"the config has {key}={value!r}" in str(error.value)


WRONG_VALUES = [
    ("sdar", {"block_size": 0}, "block_size must be a positive integer, got 0"),
    ("fast-dllm-v2", {"bd_size": "x"}, "bd_size must be a positive integer, got 'x'"),
    ("sdar-moe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above num_experts 8"),
    ("sdar-moe", {"moe_intermediate_size": None}, "moe_intermediate_size must be a positive integer, got None"),
    ("llada2", {"n_group": 3}, "n_group must cut the 8 experts into equal groups"),
    ("llada2", {"topk_group": 5}, "and topk_group=5"),
    ("llada2", {"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer of at least 0, got -1"),
    ("llada2", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must make an even number of a head's 32"),
    ("llada-moe", {"moe_layer_freq": [1]}, "moe_layer_freq must hold 0 or 1 for each of 2 layers, got [1]"),
]


@pytest.mark.parametrize(("writer", "change", "message"), WRONG_VALUES, ids=str)
def test_wrong_values_are_refused(writer, change, message):
    path = written(writer, f"value-{writer}")
    edit_config(path, **change)
    with pytest.raises(ValueError) as error:
        config_class(writer).from_pretrained(path).check()
    assert message in str(error.value)


@pytest.mark.parametrize("writer", block_checkpoints.WRITERS)
def test_written_configs_pass(writer):
    config_class(writer).from_pretrained(folder(writer)).check()


# ---- tensors

LAYER = "model.layers.1"
BROKEN = {
    "no-norm-of-heads": ("sdar", lambda t: t.pop(f"{LAYER}.self_attn.q_norm.weight"), "lacks 1 of its tensors: {}"),
    "norm-of-heads": ("stable-diffcoder", lambda t: put(t, f"{LAYER}.self_attn.k_norm.weight", 32), "does not have: {}"),
    "no-expert": ("llada2", lambda t: t.pop(f"{LAYER}.mlp.experts.3.up_proj.weight"), "lacks 1 of its tensors: {}"),
    "no-bias": ("llada2", lambda t: t.pop(f"{LAYER}.mlp.gate.expert_bias"), "lacks 1 of its tensors: {}"),
    "no-shared": ("llada2", lambda t: t.pop(f"{LAYER}.mlp.shared_experts.down_proj.weight"), "lacks 1 of its tensors: {}"),
    "expert-too-many": ("llada2", lambda t: put(t, f"{LAYER}.mlp.experts.8.up_proj.weight", 64, 128), "does not have: {}"),
    "dense-in-sparse": ("llada2", lambda t: put(t, f"{LAYER}.mlp.up_proj.weight", 200, 128), "does not have: {}"),
    "sparse-in-dense": ("llada2", lambda t: put(t, "model.layers.0.mlp.gate.weight", 8, 128), "does not have: {}"),
    "bias-elsewhere": ("sdar-moe", lambda t: put(t, f"{LAYER}.mlp.gate.expert_bias", 8), "does not have: {}"),
    "wrong-expert": ("sdar-moe", lambda t: put(t, f"{LAYER}.mlp.experts.2.down_proj.weight", 64, 128), "{} has shape"),
    "wrong-qkv": ("llada2", lambda t: put(t, f"{LAYER}.attention.query_key_value.weight", 255, 128), "{} has shape"),
    "wrong-merged": ("llada2-merged", lambda t: put(t, "model.layers.2.mlp.experts.up_proj", 7, 64, 128), "{} has shape"),
    "no-merged": ("llada2-merged", lambda t: t.pop("model.layers.2.mlp.experts.up_proj"), "lacks 8 of its tensors"),
}  # fmt: skip


def put(tensors, name, *shape):
    tensors[name] = torch.zeros(shape)
    return name


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_are_missing_surplus_or_of_another_shape(name):
    checkpoint, change, message = BROKEN[name]
    writer, options = CHECKPOINTS[checkpoint]
    path = written(writer, f"broken-{name}", **options | {"shards": 1})
    tensors = load_file(path / "model.safetensors")
    before = set(tensors)
    change(tensors)
    changed = (before ^ set(tensors)) or {n for n in tensors if not tensors[n].any()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception) as error:
        new_engine(path)
    assert message.format(*changed) in chain(error.value)


def chain(error):
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


# ---- adapters


def test_names_of_modules_for_adapters():
    """vLLM renames the modules that an adapter speaks of."""
    for name, ours in (
        (f"{LAYER}.self_attn.q_proj", "decoder.blocks.1.q_proj"),
        (f"{LAYER}.mlp.up_proj", "decoder.blocks.1.mlp.up_proj"),
        (f"{LAYER}.attention.query_key_value", "decoder.blocks.1.qkv_proj"),
        (f"{LAYER}.mlp.shared_experts.gate_proj", "decoder.blocks.1.mlp.shared.gate_proj"),
        (f"{LAYER}.mlp.shared_experts.down_proj", "decoder.blocks.1.mlp.shared.down_proj"),
    ):
        checkpoint = "sdar" if "self_attn" in name or "mlp.up" in name else "llada2"
        model = model_runner(engine(checkpoint)).model
        assert model.hf_to_vllm_mapper.apply_list([name]) == [ours]
