"""What the tests share. Importing any of it sets the environment, before vLLM is imported.

The engine runs in the test's own process, on one thread (sums are then the same everywhere), asks no model hub, and
remembers model classes for this Python environment only.
"""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a test may start a script with an engine of its own
os.environ.setdefault("VLLM_CACHE_ROOT", str(Path(sys.prefix) / "cache"))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
