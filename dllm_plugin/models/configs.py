"""HF configs of the families whose published checkpoints carry theirs as remote code.

Both classes are module-level: vLLM sends them between processes by pickle. A structural key that is missing is an
error, never a default: the defaults of LLaDA's own class are GPT-2's, and would build another model without a word.
"""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class _StrictConfig(PretrainedConfig):
    """A config whose structural keys must be in config.json, and whose unsupported variants are refused."""

    # to_diff_dict() and repr() would otherwise build an instance without arguments
    has_no_defaults_at_init = True
    required_keys: ClassVar[tuple[str, ...]] = ()
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {}
    sizes: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    )

    def __init__(self, **kwargs: Any) -> None:
        if missing := [key for key in self.required_keys if key not in kwargs]:
            raise ValueError(
                f"config.json of this {self.model_type!r} model lacks {', '.join(missing)}; no default can stand in "
                "for a structural key: take config.json from the published checkpoint"
            )
        self._refuse_other_structures({key: kwargs[key] for key in self.supported_values if key in kwargs})
        super().__init__(**kwargs)
        if self._rotation == {"rope_type": "default", "rope_theta": self.rope_theta}:
            self.rope_parameters = None  # says nothing else, and would contradict an override of rope_theta

    @property
    def _rotation(self) -> dict[str, Any]:
        return getattr(self, "rope_parameters", None) or {}

    def check(self) -> None:
        """Raise ValueError, naming the key, for a value no model can be built of, from config.json or an override."""
        values = {key: getattr(self, key) for key in self.supported_values if hasattr(self, key)}
        values.pop("rope_scaling", None)  # where transformers keeps the plain rotation, too
        self._refuse_other_structures(values)
        plain = {"rope_type": "default", "rope_theta": self.rope_theta}
        if plain | self._rotation != plain:
            raise ValueError(
                f"rope_parameters is {self._rotation!r}, and positions are rotated by rope_theta alone, which is "
                f"{self.rope_theta!r}; set rope_theta, and leave rope_parameters and rope_scaling out"
            )
        for key in ("rope_theta", "rms_norm_eps"):
            if not isinstance(value := getattr(self, key), int | float) or not value > 0:
                raise ValueError(
                    f"{key} must be a positive number, got {value!r}; take it from the published config.json"
                )
        for key in self.sizes:
            if not is_integer(value := getattr(self, key)) or value < 1:
                raise ValueError(
                    f"{key} must be a positive integer, got {value!r}; take it from the published config.json"
                )
        for key in ("mask_token_id", "eos_token_id"):
            if not is_integer(value := getattr(self, key)) or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{key} must be one token id below the vocabulary's size {self.vocab_size}, got {value!r}; take it from "
                    "the published config.json (more ids that end a response: generation_config.json, stop_token_ids)"
                )

    def _refuse_other_structures(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if value not in (supported := self.supported_values[key]):
                raise ValueError(
                    f"the config has {key}={value!r}, and the {self.model_type!r} adapter supports only "
                    f"{' or '.join(map(repr, supported))}; another structure needs an adapter of its own"
                )


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class LLaDAConfig(_StrictConfig):
    """LLaDA (dense): keys as in GSAI-ML/LLaDA-8B-Instruct:config.json, also under the names engines read."""

    model_type = "llada"
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
        "mask_token_id",
        "eos_token_id",
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

    def check(self) -> None:
        super().check()
        if not is_integer(self.embedding_size) or self.embedding_size < self.vocab_size:
            raise ValueError(
                f"embedding_size must be an integer of at least vocab_size {self.vocab_size}, got {self.embedding_size!r}; "
                "take it from the published config.json"
            )


class DreamConfig(_StrictConfig):
    """Dream, DiffuCoder, Dream-Coder: keys as in Dream-org/Dream-v0-Instruct-7B:config.json."""

    model_type = "Dream"
    required_keys = (
        *_StrictConfig.sizes,
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "mask_token_id",
        "eos_token_id",
    )
    supported_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "use_sliding_window": (False, None),
        "use_mrope": (False, None),
    }

    def __init__(self, **kwargs: Any) -> None:
        # transformers replaces the inherited __init__ of a class that has none of its own
        super().__init__(**kwargs)
