"""Checkpoints of the tests by name, bundled or of random weights, and the reference model of each."""

import atexit
import functools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reference import block_checkpoints, block_models, checkpoints
from reference import model as reference_model

from dllm_plugin.checkpoints import path as bundled_path

# of the random-weight checkpoints
VOCABULARY, MASK, EOS, TURN_END = 331, 325, 320, 321

_folder = tempfile.TemporaryDirectory(prefix="dllm-plugin-tests-")
atexit.register(_folder.cleanup)

# name: (writer, its options); each writer's own name is one of them
RANDOM_WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{writer: (writer, {"seed": 3}) for writer in checkpoints.WRITERS},
    "llada-tied": ("llada", {"seed": 7, "weight_tying": True, "n_kv_heads": 4, "vocab_size": 327}),
    "dream-tied": ("dream", {"seed": 7, "tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 327}),
    # what pads the vocabulary is often the model's first choice, as are EOS, the mask and the end of turn below
    "llada-padded": ("llada", {"seed": 5, "embedding_size": 344, "loud": dict.fromkeys(range(331, 344), 2.0)}),
    "llada-loud": ("llada", {"seed": 4, "loud": {MASK: 3.0, EOS: 2.5, TURN_END: 2.0}}),
    "dream-loud": ("dream", {"seed": 4, "loud": {MASK: 3.0, EOS: 2.5, TURN_END: 2.0}}),
}
BLOCK_WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{writer: (writer, {"seed": 3}) for writer in block_checkpoints.WRITERS},
    "sdar-b8": ("sdar", {"seed": 5, "block_size": 8}),
    "sdar-loud": ("sdar", {"seed": 4, "loud": {MASK: 3.0, EOS: 2.5}}),
    "sdar-tied": ("sdar", {"seed": 7, "tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 327}),
}


def temporary_folder(name: str) -> Path:
    """Where a test module writes a checkpoint; gone at the end of the process."""
    return Path(_folder.name) / name


@functools.cache
def folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint by its name, which is one of those above or a bundled one; a folder is itself."""
    if isinstance(checkpoint, Path):
        return checkpoint
    if checkpoint not in RANDOM_WEIGHTS | BLOCK_WEIGHTS:
        return bundled_path(checkpoint)
    family, settings = (RANDOM_WEIGHTS | BLOCK_WEIGHTS)[checkpoint]
    return write_checkpoint(family, checkpoint, **settings)


def write_checkpoint(family: str, name: str, **settings: Any) -> Path:
    """A random-weight checkpoint whose config names the end of turn, because it has no tokenizer that would."""
    written = (checkpoints.WRITERS | block_checkpoints.WRITERS)[family](Path(_folder.name) / name, **settings)
    edit_config(written, eot_token_id=TURN_END)
    return written


def edit_config(checkpoint: Path, *, remove: Iterable[str] = (), **changes: Any) -> None:
    """Rewrite a written checkpoint's config.json."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))


def architecture(checkpoint: str) -> str:
    (name,) = json.loads((folder(checkpoint) / "config.json").read_text())["architectures"]
    return name


@functools.cache
def reference(checkpoint: str) -> reference_model.ReferenceModel | block_models.LLaDAMoE:
    """The model of a family under full attention."""
    of_block = architecture(checkpoint) in block_models.FAMILIES
    return (block_models if of_block else reference_model).load(folder(checkpoint))


@functools.cache
def block_reference(checkpoint: str) -> block_models.BlockModel:
    return block_models.load(folder(checkpoint))
