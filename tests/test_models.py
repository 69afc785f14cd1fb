"""The adapters: logits against a plain model, where bfloat16 rounds, names and shapes of published checkpoints."""

import functools
import shutil
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from reference import llada
from reference.model import load
from safetensors.torch import load_file, save_file
from support.cases import PolicyCase, difference, random_prompt
from support.checkpoints import edit_config, folder, reference, write_checkpoint
from support.engines import drive, engine, model_runner, new_engine
from vllm import SamplingParams

from dllm_plugin.models.configs import DreamConfig, LLaDAConfig
from dllm_plugin.models.dream import DreamForDiffusionLM
from dllm_plugin.models.llada import LLaDAForDiffusionLM

CHECKPOINTS = ("llada", "dream", "llada-tied", "dream-tied", "llada-padded", "tiny-llada", "tiny-dream")
KEPT: list = []  # closing an engine takes vLLM's process groups from the others


@contextmanager
def recorded(llm):
    """The token ids and hidden states [tokens, hidden] of every forward pass inside."""
    model, passes = model_runner(llm).model, []
    forward = model.forward

    def record(input_ids, *args, **kwargs):
        hidden = forward(input_ids, *args, **kwargs)
        passes.append((input_ids.clone(), hidden.clone()))
        return hidden

    model.forward = record
    try:
        yield passes
    finally:
        del model.forward


@torch.inference_mode()
def first_pass(llm, *prompts, masks=7):
    """Ids and hidden states of each request's window in its first denoising step, all in one batch."""
    params = SamplingParams(temperature=0.0, max_tokens=masks, ignore_eos=True, detokenize=False)
    with recorded(llm) as passes:
        drive(llm, [(prompt, params) for prompt in prompts])
    ids, hidden = passes[0]
    lengths = [len(prompt) + masks for prompt in prompts]
    assert len(ids) == sum(lengths)
    return list(zip(ids.split(lengths), hidden.split(lengths), strict=True))


# ---- float32


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@torch.inference_mode()
def test_logits(checkpoint, num_requests):
    """Of every position, prompt included, alone and beside requests of other lengths."""
    llm, plain = engine(checkpoint), reference(checkpoint)
    limit = min(310, plain.vocab_size)
    prompts = [[t % limit for t in random_prompt(n, f"logits-{n}")] for n in (9, 1, 30)][:num_requests]
    for prompt, (ids, hidden) in zip(prompts, first_pass(llm, *prompts), strict=True):
        assert ids.tolist() == prompt + [plain.mask_token_id] * 7
        logits = model_runner(llm).model.compute_logits(hidden)
        expected = plain.forward(ids.long())
        assert logits.shape == expected.shape == (len(ids), plain.vocab_size)
        assert (logits - expected).abs().max() <= 1e-4


def test_text_of_what_pads_the_vocabulary(tmp_path):
    """embedding_size above vocab_size: a row behind the vocabulary is chosen as any other, and has no text."""
    padded = tmp_path / "padded"
    shutil.copytree(folder("tiny-llada"), padded)
    weights = load_file(padded / "model.safetensors")
    for name in ("model.transformer.wte.weight", "model.transformer.ff_out.weight"):
        if name in weights:
            weights[name] = torch.cat([weights[name], 1.1 * weights[name][32:96]])
    save_file(weights, padded / "model.safetensors")
    vocabulary = reference("tiny-llada").vocab_size
    edit_config(padded, embedding_size=vocabulary + 64)
    llm = new_engine(padded)
    KEPT.append(llm)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    (output,) = llm.chat([{"role": "user", "content": "Reverse the word cat."}], params, use_tqdm=False)
    want = llada.generate(load(padded), output.prompt_token_ids, 24, 24).tokens
    assert list(output.outputs[0].token_ids) == want
    known = [token for token in want if token < vocabulary]
    assert len(known) < len(want)
    assert output.outputs[0].text == llm.get_tokenizer().decode(known, skip_special_tokens=True)


# ---- bfloat16


def bfloat16_forward(family, config, weights, ids, norm_weight_in_float32=False, rotate_in_float32=None):
    """Hidden states after the last norm, as the published modeling code computes them in bfloat16.

    RMSNorm is computed in float32, rounded, then multiplied by its weight. LLaDA rotates in float32; Dream rounds
    cosine and sine first. The switches move the two roundings elsewhere, to see that it would be noticed.
    """
    llada = family == "llada"
    heads = config["n_heads" if llada else "num_attention_heads"]
    kv_heads = config["n_kv_heads" if llada else "num_key_value_heads"]
    head_size = config["d_model" if llada else "hidden_size"] // heads
    rotate_in_float32 = llada if rotate_in_float32 is None else rotate_in_float32

    def norm(x, name):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])
        weight = weights[f"{name}.weight"]
        return (wide * weight.float()).bfloat16() if norm_weight_in_float32 else wide.bfloat16() * weight

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rotated(x):
        angle = torch.arange(len(ids)).float()[:, None] / config["rope_theta"] ** (
            torch.arange(0, head_size, 2) / head_size
        )
        angle = torch.cat((angle, angle), -1)[:, None]
        dtype = torch.float32 if rotate_in_float32 else torch.bfloat16
        x, cos, sin = x.to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).bfloat16()

    if llada:
        block, embedding, last = (
            "model.transformer.blocks.{}.",
            "model.transformer.wte.weight",
            "model.transformer.ln_f",
        )
        names = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
    else:
        block, embedding, last = "model.layers.{}.", "model.embed_tokens.weight", "model.norm"
        names = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    h = weights[embedding][ids]
    for layer in range(config["n_layers" if llada else "num_hidden_layers"]):
        norm1, q, k, v, out, norm2, gate, up, down = (block.format(layer) + name for name in names)
        x = norm(h, norm1)
        q = rotated(linear(x, q).view(len(ids), heads, head_size))
        k = rotated(linear(x, k).view(len(ids), kv_heads, head_size)).repeat_interleave(heads // kv_heads, 1)
        v = linear(x, v).view(len(ids), kv_heads, head_size).repeat_interleave(heads // kv_heads, 1)
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        h = h + linear(attended, out)
        x = norm(h, norm2)
        h = h + linear(F.silu(linear(x, gate)) * linear(x, up), down)
    return norm(h, last)


@functools.cache
def bfloat16_engine(family):
    path = write_checkpoint(family, f"{family}-bfloat16", seed=3, dtype=torch.bfloat16)
    return path, new_engine(path, dtype="bfloat16")


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.inference_mode()
def test_bfloat16_rounds_where_the_published_code_does(family):
    path, llm = bfloat16_engine(family)
    plain = load(path, torch.bfloat16)
    ((ids, hidden),) = first_pass(llm, random_prompt(40, "bfloat16"), masks=24)
    forward = functools.partial(bfloat16_forward, family, plain.config, plain.weights, ids.long())

    def distance(**switches):
        return (forward(**switches).float() - hidden.float()).abs().mean().item()

    assert hidden.dtype == torch.bfloat16
    assert distance() < 1e-3
    assert distance(norm_weight_in_float32=True) > 5 * max(distance(), 1e-4)
    assert distance(rotate_in_float32=family == "dream") > 5 * max(distance(), 1e-4)


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.inference_mode()
def test_bfloat16_is_close_to_float32(family):
    path, llm = bfloat16_engine(family)
    ((ids, hidden),) = first_pass(llm, random_prompt(40, "bfloat16"), masks=24)
    logits = model_runner(llm).model.compute_logits(hidden).float()
    expected = load(path).forward(ids.long())
    assert torch.cosine_similarity(logits, expected, dim=-1).min() > 0.995
    assert (logits - expected).abs().mean() < 3e-2 * expected.abs().mean()


# ---- names and shapes of the published checkpoints

LLADA_BLOCK = {"attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"}
LLADA_TENSORS = {f"model.transformer.{name}.weight" for name in ("wte", "ff_out", "ln_f")} | {
    f"model.transformer.blocks.{n}.{name}.weight" for n in range(32) for name in LLADA_BLOCK
}
DREAM_LAYER = {
    "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight",
    "mlp.up_proj.weight", "mlp.down_proj.weight",
    *(f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")),
}  # fmt: skip
DREAM_TENSORS = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} | {
    f"model.layers.{n}.{name}" for n in range(28) for name in DREAM_LAYER
}


@pytest.mark.parametrize(
    "adapter, tensors, number, layers",
    [(LLaDAForDiffusionLM, LLADA_TENSORS, 291, 32), (DreamForDiffusionLM, DREAM_TENSORS, 339, 28)],
    ids=["llada", "dream"],
)
def test_tensor_names(adapter, tensors, number, layers):
    """Each published tensor has a place of its own, and no tensor of another name has one."""
    assert len(tensors) == number
    places = {adapter.names.locate(name) for name in tensors}
    assert len(places) == number and not any(target == "" for target, _ in places)
    assert tensors <= set(adapter.names.tensors_of(layers))
    for stranger in (
        "model.transformer.blocks.0.ff_out2.weight",
        "lm_head2.weight",
        "model.layers.x.mlp.up_proj.weight",
    ):
        assert adapter.names.locate(stranger) == ("", None)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_weights_are_reloaded_from_another_folder(family):
    """As trainers do between rollouts; a CPU has packed the weights by then."""
    llm = new_engine(folder(family))
    for checkpoint in (family, f"{family}-loud", family):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder(checkpoint))})
        case = PolicyCase(checkpoint, "entropy", 6, prompt=7)
        assert not difference(case, drive(llm, [case.request])[0][0])
    KEPT.append(llm)


@pytest.mark.parametrize(
    "name, place",
    [
        ("model.transformer.ff_out.weight", ("head.weight", None)),
        ("model.transformer.blocks.3.ff_out.weight", ("blocks.3.mlp.down_proj.weight", None)),
        ("model.transformer.blocks.31.ff_proj.weight", ("blocks.31.mlp.gate_up_proj.weight", 0)),
        ("model.transformer.blocks.0.up_proj.weight", ("blocks.0.mlp.gate_up_proj.weight", 1)),
        ("model.transformer.ln_f.weight", ("norm.weight", None)),
    ],
)
def test_ff_out_is_two_tensors(name, place):
    assert LLaDAForDiffusionLM.names.locate(name) == place


def test_shapes_of_the_published_configs():
    llada = LLaDAForDiffusionLM.shape_of(
        LLaDAConfig(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, vocab_size=126464,
                    embedding_size=126464, max_sequence_length=4096, block_type="llama", layer_norm_type="rms",
                    activation_type="silu", rope=True, rms_norm_eps=1e-5, rope_theta=500000.0, weight_tying=False,
                    mask_token_id=126336, eos_token_id=126081)
    )  # fmt: skip
    assert (llada.head_size, llada.rotary_size, llada.num_embeddings) == (128, 128, 126464)
    assert llada.intermediate_size == 12288 and llada.rope_in_float32
    assert not (llada.qkv_bias or llada.qk_norm or llada.tie_embeddings)
    dream = DreamForDiffusionLM.shape_of(
        DreamConfig(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                    intermediate_size=18944, vocab_size=152064, max_position_embeddings=131072, rms_norm_eps=1e-6,
                    rope_theta=1e6, tie_word_embeddings=False, mask_token_id=151666, eos_token_id=151643)
    )  # fmt: skip
    assert (dream.head_size, dream.num_kv_heads, dream.num_embeddings) == (128, 4, 152064)
    assert dream.qkv_bias and not (dream.qk_norm or dream.tie_embeddings or dream.rope_in_float32)


# ---- how a checkpoint is found


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_trust_remote_code_is_harmless(family):
    """The config's auto_map names files that are not there; nothing asks for them."""
    llm = new_engine(folder(family), trust_remote_code=True)
    KEPT.append(llm)
    case = PolicyCase(family, "entropy", 6, prompt=5)
    assert not difference(case, drive(llm, [case.request])[0][0])
    assert type(llm.model_config.hf_config).__module__ == "dllm_plugin.models.configs"


def test_tied_heads_are_one_tensor():
    for checkpoint in ("llada-tied", "dream-tied"):
        decoder = model_runner(engine(checkpoint)).model.decoder
        assert decoder.head is decoder.embedding
    assert model_runner(engine("llada")).model.decoder.head is not model_runner(engine("llada")).model.decoder.embedding
