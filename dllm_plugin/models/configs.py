"""HF configs of the families, whose published checkpoints carry theirs as remote code.

All classes are module-level: vLLM sends them between processes by pickle. A structural key that is missing is an error,
never a default: the defaults of the published classes are those of other models (GPT-2's in LLaDA's), and would build
another model without a word.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

from transformers import PretrainedConfig

from dllm_plugin.families import ARCHITECTURES, FAMILIES
from dllm_plugin.messages import shown

# What a structural key must be, in words, and whether a value is.
Kind = tuple[str, Callable[[Any], bool]]
SIZE: Kind = ("a positive integer", lambda value: is_integer(value) and value > 0)
COUNT: Kind = ("an integer of at least 0", lambda value: is_integer(value) and value >= 0)
RATE: Kind = ("a positive number", lambda value: type(value) in (int, float) and 0 < value < math.inf)
TRUTH: Kind = ("true or false", lambda value: isinstance(value, bool))


class DiffusionConfig(PretrainedConfig):
    """A config whose structural keys must be in config.json, and whose unsupported variants are refused.

    A value of the wrong kind is refused where it is set, by config.json or by an override: transformers and vLLM compute with
    it before ``check``.

    Token ids and the length of a block, ``block_length``, are those of the family where config.json has none. A class below
    it names an ``__init__``: transformers would write one in place of an inherited one, which reads no key.
    """

    # to_diff_dict() and repr() would otherwise build an instance without arguments
    has_no_defaults_at_init = True
    required_keys: ClassVar[tuple[str, ...]] = ()
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {}
    kinds: ClassVar[dict[str, Kind]] = {
        "hidden_size": SIZE,
        "num_hidden_layers": SIZE,
        "num_attention_heads": SIZE,
        "num_key_value_heads": SIZE,
        "intermediate_size": SIZE,
        "vocab_size": SIZE,
        "max_position_embeddings": SIZE,
        "block_length": SIZE,
        "head_dim": SIZE,
        "rope_theta": RATE,
        "rms_norm_eps": RATE,
        "partial_rotary_factor": RATE,
        "tie_word_embeddings": TRUTH,
    }
    optional: ClassVar[tuple[str, ...]] = ("block_length", "head_dim", "partial_rotary_factor")

    def __init__(self, **kwargs: Any) -> None:
        family = next(f for f in FAMILIES if f.config == f"{type(self).__module__}:{type(self).__name__}")
        block_key = self.attribute_map.get("block_length", "block_length")
        known = {
            "mask_token_id": family.mask_token_id,
            "eos_token_id": family.eos_token_id,
            block_key: family.block_length,
        }
        kwargs |= {key: value for key, value in known.items() if value is not None and kwargs.get(key) is None}
        required = (*self.required_keys, "mask_token_id", "eos_token_id")
        if missing := [key for key in required if key not in kwargs]:
            raise ValueError(
                f"config.json of this {shown(self.model_type)} model lacks {', '.join(missing)}; no default can stand in "
                "for a structural key: take config.json from the published checkpoint"
            )
        self._refuse_other_structures({key: kwargs[key] for key in self.supported_values if key in kwargs})
        super().__init__(**kwargs)
        if self._rotation == self._plain_rotation:
            self.rope_parameters = None  # says nothing else, and would contradict an override of rope_theta

    def __setattr__(self, key: str, value: Any) -> None:
        if value is not None:  # null stands for a default in some keys
            self._refuse_other_kind(key, value)
        super().__setattr__(key, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the family that config.json names as its architecture: families share a ``model_type``."""
        named = config_dict.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else None
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"config.json must name its architecture, one of {', '.join(ARCHITECTURES)}, got architectures={shown(named)}; "
                "take it from the published config.json"
            )
        own: type[DiffusionConfig] = ARCHITECTURES[architecture].config_class
        return super(DiffusionConfig, own).from_dict(config_dict, **kwargs)

    @property
    def head_size(self) -> int:
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Dimensions of a head that positions rotate."""
        return int(self.head_size * (getattr(self, "partial_rotary_factor", None) or 1))

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding, those that pad the vocabulary among them."""
        return self.vocab_size

    @property
    def _rotation(self) -> dict[str, Any]:
        return getattr(self, "rope_parameters", None) or {}

    @property
    def _plain_rotation(self) -> dict[str, Any]:
        factor = getattr(self, "partial_rotary_factor", None)
        partial = {} if factor is None else {"partial_rotary_factor": factor}
        return {"rope_type": "default", "rope_theta": self.rope_theta} | partial

    def check(self) -> None:
        """Raise ValueError, naming the key, for a value no model can be built of, from config.json or an override."""
        values = {key: getattr(self, key) for key in self.supported_values if hasattr(self, key)}
        values.pop("rope_scaling", None)  # where transformers keeps the plain rotation, too
        self._refuse_other_structures(values)
        plain = self._plain_rotation
        if plain | self._rotation != plain:
            raise ValueError(
                f"rope_parameters is {shown(self._rotation)}, and positions are rotated by rope_theta alone, which is "
                f"{shown(self.rope_theta)}; set rope_theta, and leave rope_parameters and rope_scaling out"
            )
        for key in self.kinds:
            if (value := getattr(self, key, None)) is not None or key not in self.optional:
                self._refuse_other_kind(key, value)
        if getattr(self, "head_dim", None) is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size {self.hidden_size}, got {self.num_attention_heads}; take both from "
                "the published config.json"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads {self.num_attention_heads}, got "
                f"{self.num_key_value_heads}; take both from the published config.json"
            )
        if (experts := getattr(self, "num_experts", 0)) and self.num_experts_per_tok > experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is above num_experts {experts}; take both from the published "
                "config.json"
            )
        if self.rotary_size % 2 or not 0 < self.rotary_size <= self.head_size:
            raise ValueError(
                f"partial_rotary_factor must make an even number of a head's {self.head_size} dimensions turn, got "
                f"{self.rotary_size}; take it and head_dim from the published config.json"
            )
        for key in ("mask_token_id", "eos_token_id"):
            if not is_integer(value := getattr(self, key)) or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{key} must be one token id below the vocabulary's size {self.vocab_size}, got {shown(value)}; take it from "
                    "the published config.json (more ids that end a response: generation_config.json, stop_token_ids)"
                )

    def _refuse_other_kind(self, key: str, value: Any) -> None:
        engine_name = next((name for name, own in self.attribute_map.items() if own == key), key)
        kind, holds = self.kinds.get(engine_name, ("", lambda value: True))
        if not holds(value):
            raise ValueError(
                f"{self.attribute_map.get(key, key)} must be {kind}, got {shown(value)}; take it from the published config.json"
            )

    def _refuse_other_structures(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if value not in (supported := self.supported_values[key]):
                raise ValueError(
                    f"the config has {key}={shown(value)}, and the {shown(self.model_type)} adapter supports only "
                    f"{' or '.join(map(repr, supported))}; another structure needs an adapter of its own"
                )


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class LLaDAConfig(DiffusionConfig):
    """LLaDA (dense): keys as in GSAI-ML/LLaDA-8B-Instruct:config.json, also under the names engines read."""

    model_type = "llada"
    kinds = DiffusionConfig.kinds | {"embedding_size": SIZE}
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }
    required_keys = (
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "mlp_hidden_size",
        "vocab_size",
        "embedding_size",
        "max_sequence_length",
        "block_type",
        "layer_norm_type",
        "activation_type",
        "rope",
        "rope_theta",
        "rms_norm_eps",
        "weight_tying",
    )
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "activation_type": ("silu",),
        "rope": (True,),
        "rope_full_precision": (True,),
        "rope_scaling": (None,),
        "alibi": (False,),
        "include_bias": (False,),
        "include_qkv_bias": (False,),
        "bias_for_layer_norm": (False, None),
        "attention_layer_norm": (False,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
        "multi_query_attention": (False, None),
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # null in config.json stands for these in the published modeling code
        if self.n_kv_heads is None:
            self.n_kv_heads: int = self.n_heads
        if self.embedding_size is None:
            self.embedding_size: int = self.vocab_size

    @property
    def num_embeddings(self) -> int:
        return self.embedding_size

    def check(self) -> None:
        super().check()
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"embedding_size must be at least vocab_size {self.vocab_size}, got {shown(self.embedding_size)}; "
                "take it from the published config.json"
            )


# what config.json of Llama's and Qwen's layouts must have
LLAMA_KEYS = tuple(key for key in DiffusionConfig.kinds if key not in DiffusionConfig.optional)


class DreamConfig(DiffusionConfig):
    """Dream, DiffuCoder, Dream-Coder: keys as in Dream-org/Dream-v0-Instruct-7B:config.json."""

    model_type = "Dream"
    required_keys = LLAMA_KEYS
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "use_sliding_window": (False, None),
        "use_mrope": (False, None),
    }
    __init__ = DiffusionConfig.__init__


class SDARConfig(DiffusionConfig):
    """SDAR, TraDo: keys as in yjyddq/DARE:models/SDAR-4B-Chat/config.json. Heads are wider than hidden_size / heads."""

    model_type = "sdar"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "block_size"}
    required_keys = (*LLAMA_KEYS, "head_dim")
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "attention_bias": (False, None),
        "use_sliding_window": (False, None),
    }
    __init__ = DiffusionConfig.__init__


class DreamReasonerConfig(DiffusionConfig):
    """DreamReasoner: keys as in a test of SJTU-DENG-Lab/Diffulex; head_dim may be null. ``model_type`` is Dream's."""

    model_type = "Dream"
    attribute_map = SDARConfig.attribute_map
    required_keys = LLAMA_KEYS
    supported_values = SDARConfig.supported_values
    __init__ = DiffusionConfig.__init__


class FastDLLMConfig(DiffusionConfig):
    """Fast-dLLM v2: keys as in Efficient-Large-Model/Fast_dLLM_v2_7B:config.json."""

    model_type = "Fast_dLLM_Qwen"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "bd_size"}
    required_keys = LLAMA_KEYS
    supported_values = DreamConfig.supported_values
    __init__ = DiffusionConfig.__init__


class StableDiffCoderConfig(DiffusionConfig):
    """Stable-DiffCoder: keys as in a Llama's config.json, whose ``model_type`` it has there.

    Registered under one of its own: under Llama's it would be the config of every Llama.
    """

    model_type = "stable_diffcoder"
    attribute_map = SDARConfig.attribute_map
    required_keys = LLAMA_KEYS
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
    }
    __init__ = DiffusionConfig.__init__


# ---- with experts

EXPERT_KINDS: dict[str, Kind] = {"num_experts": SIZE, "num_experts_per_tok": SIZE, "moe_intermediate_size": SIZE}


class SDARMoeConfig(SDARConfig):
    """SDAR-30B-A3B: keys as in yjyddq/DARE:models/SDAR-30B-A3B-Chat/config.json."""

    model_type = "sdar_moe"
    kinds = SDARConfig.kinds | EXPERT_KINDS
    required_keys = (*SDARConfig.required_keys, *EXPERT_KINDS, "norm_topk_prob")
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = SDARConfig.supported_values | {
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
        "norm_topk_prob": (True, False),
    }
    __init__ = DiffusionConfig.__init__


class LLaDAMoEConfig(DiffusionConfig):
    """LLaDA-MoE: keys as in inclusionAI/LLaDA-MoE-7B-A1B-Base:configuration_lladamoe.py. ``model_type`` is LLaDA's."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "intermediate_size": "dense_intermediate_size",
        "moe_intermediate_size": "expert_intermediate_size",
    }
    kinds = DiffusionConfig.kinds | EXPERT_KINDS
    required_keys = (
        *(key for key in LLAMA_KEYS if key != "intermediate_size"),
        "num_experts",
        "num_experts_per_tok",
        "dense_intermediate_size",
        "expert_intermediate_size",
        "moe_layer_freq",
        "qk_layernorm",
    )
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "attention_bias": (False, None),
        "clip_qkv": (None,),
        "shared_expert_intermediate_size": (None, 0),
        "moe_router_enable_expert_bias": (False, None),
        "moe_router_score_function": ("softmax", None),
        "norm_topk_prob": (True, False, None),
        "qk_layernorm": (True, False),
    }
    __init__ = DiffusionConfig.__init__

    def check(self) -> None:
        super().check()
        layers = self.moe_layer_freq
        if not isinstance(layers, list) or len(layers) != self.num_hidden_layers or not set(layers) <= {0, 1}:
            raise ValueError(
                f"moe_layer_freq must hold 0 or 1 for each of {self.num_hidden_layers} layers, got {shown(layers)}; take it from "
                "the published config.json"
            )


class LLaDA2Config(DiffusionConfig):
    """LLaDA2.0 and 2.1: keys as in yjyddq/DARE:models/LLaDA2.0-mini/config.json. EOS is the padding."""

    model_type = "llada2_moe"
    attribute_map = SDARConfig.attribute_map
    kinds: ClassVar[dict[str, Kind]] = DiffusionConfig.kinds | EXPERT_KINDS | {
        "n_group": SIZE, "topk_group": SIZE, "num_shared_experts": COUNT, "first_k_dense_replace": COUNT,
        "routed_scaling_factor": RATE,
    }  # fmt: skip
    optional = (*DiffusionConfig.optional, "num_shared_experts", "first_k_dense_replace")
    required_keys = (
        *LLAMA_KEYS,
        *EXPERT_KINDS,
        "head_dim",
        "partial_rotary_factor",
        "n_group",
        "topk_group",
        "num_shared_experts",
        "first_k_dense_replace",
        "routed_scaling_factor",
        "score_function",
        "use_qk_norm",
        "moe_router_enable_expert_bias",
    )
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "use_sliding_window": (False, None),
        "use_qk_norm": (True,),
        "use_rmsnorm": (True, None),
        "use_qkv_bias": (False, None),
        "use_bias": (False, None),
        "using_split_qkv_in_self_attention": (False, None),
        "score_function": ("sigmoid",),
        "moe_router_enable_expert_bias": (True,),
        "norm_head": (False, None),
        "expert_capacity": (None,),  # LLaDA2.2 routes blocks, not tokens
    }

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("eos_token_id") is None:
            kwargs["eos_token_id"] = kwargs.get("pad_token_id")
        super().__init__(**kwargs)
        self.sliding_window = None  # of no effect, and vLLM would not ask whether it is used

    def check(self) -> None:
        super().check()
        group = self.num_experts // self.n_group
        held = self.num_experts_per_tok <= self.topk_group * group
        if self.num_experts % self.n_group or group < 2 or self.topk_group > self.n_group or not held:
            raise ValueError(
                f"n_group must cut the {self.num_experts} experts into equal groups of at least 2, of which topk_group hold "
                f"num_experts_per_tok {self.num_experts_per_tok}, got n_group={self.n_group} and "
                f"topk_group={self.topk_group}; take them from the published config.json"
            )
