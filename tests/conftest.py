"""Environment and checkpoints of all tests."""

import pytest
import support  # noqa: F401  sets the environment, before vLLM is imported


@pytest.fixture(scope="session")
def checkpoints() -> dict[str, str]:
    """Folder of each bundled checkpoint."""
    from dllm_plugin import checkpoints

    return {name: str(checkpoints.path(name)) for name in checkpoints.NAMES}
