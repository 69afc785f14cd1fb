"""Dream's tokenizer, which its checkpoints bring as remote code: Qwen2's byte-level BPE under another name."""

from transformers import AutoTokenizer, PretrainedConfig, Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Loads ``vocab.json`` and ``merges.txt`` of a Dream checkpoint; special tokens come from its own files."""


class _DreamTokenizerConfig(PretrainedConfig):
    """A key for the registration. transformers finds the tokenizer by its class name, which checkpoints give.

    Registered for DreamConfig itself, it would have to compete with the checkpoint's remote code whenever
    trust_remote_code is given.
    """

    model_type = "dream_tokenizer"


def register_dream_tokenizer() -> None:
    AutoTokenizer.register(_DreamTokenizerConfig, fast_tokenizer_class=DreamTokenizer, exist_ok=True)
