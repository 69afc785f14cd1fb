"""Dream's tokenizer, which its checkpoints bring as remote code: Qwen2's byte-level BPE under another name."""

from transformers import AutoTokenizer, Qwen2Tokenizer

from dllm_plugin.models.configs import DreamConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Loads ``vocab.json`` and ``merges.txt`` of a Dream checkpoint; special tokens come from its own files."""


def register_dream_tokenizer() -> None:
    AutoTokenizer.register(DreamConfig, slow_tokenizer_class=None, fast_tokenizer_class=DreamTokenizer, exist_ok=True)
