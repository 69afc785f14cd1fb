"""Environment and engines of all tests."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before vLLM is imported: the engine runs in the test's own process, on one thread (sums are then the same everywhere),
# asks no model hub, and remembers model classes for this Python environment only.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_CACHE_ROOT", str(Path(sys.prefix) / "cache"))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

KV_CACHE_BYTES = 64 << 20


@pytest.fixture(scope="session")
def checkpoints() -> dict[str, str]:
    """Folder of each bundled checkpoint."""
    from dllm_plugin import checkpoints

    return {name: str(checkpoints.path(name)) for name in checkpoints.NAMES}


@pytest.fixture(scope="session")
def engine(checkpoints: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """``engine(checkpoint, **overrides)``: the `LLM` for a bundled checkpoint or folder, made once per arguments."""
    engines: dict[tuple[str, str], Any] = {}

    def make(checkpoint: str, **overrides: Any) -> Any:
        key = (str(checkpoint), repr(sorted(overrides.items())))
        if key not in engines:
            from vllm import LLM

            settings = {
                "dtype": "float32",
                "max_num_seqs": 16,
                "kv_cache_memory_bytes": KV_CACHE_BYTES,
                "use_tqdm_on_load": False,
            }
            engines[key] = LLM(model=checkpoints.get(checkpoint, str(checkpoint)), **(settings | overrides))
        return engines[key]

    yield make
    for llm in engines.values():
        llm.llm_engine.engine_core.shutdown()
