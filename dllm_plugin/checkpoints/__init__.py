"""Tiny trained checkpoints that ship with the package, in the Hugging Face formats of the real models.

`tools/train_tiny.py`, `tools/train_tiny_d2f.py` and `tools/train_tiny_block.py` made them; `tasks` holds the questions that
they answer.
"""

from pathlib import Path

NAMES = ("tiny-llada", "tiny-dream", "tiny-d2f", "tiny-sdar", "tiny-llada2")

# Extras that a checkpoint wants where nothing else is asked for: tiny-d2f has only learnt block-causal attention.
DECODING: dict[str, dict[str, str]] = {"tiny-d2f": {"diffusion_strategy": "d2f"}}


def path(name: str) -> Path:
    """The folder of the checkpoint `name`, to be given to vLLM as the model."""
    if name not in NAMES:
        raise ValueError(f"unknown checkpoint {name!r}; the package has {', '.join(NAMES)}")
    return Path(__file__).parent / name
