"""Lay the Python files of a vLLM release over the compiled ones of the installed CPU build, to test against that release.

    python packaging/unpack_release.py 0.33.0 FOLDER [PACKAGE ...]

There is a CPU build of few releases. With FOLDER in PYTHONPATH this one is imported instead of the installed; PACKAGEs are
what it needs beyond that one. What calls compiled code that the CPU build lacks fails. See `make test-release`.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
FOR_CUDA = ("--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_x86_64")
LARGEST = 4 << 20  # bytes; what is larger is compiled code, whatever it is called


def unpack(release: str, folder: Path, packages: list[str]) -> None:
    installed = Path(importlib.util.find_spec("vllm").origin).parent
    with tempfile.TemporaryDirectory() as download:
        subprocess.run([*PIP, "download", *FOR_CUDA, "-d", download, f"vllm=={release}"], check=True)
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            for file in files.infolist():
                if not file.filename.endswith(".so") and file.file_size < LARGEST:
                    files.extract(file, folder)
    for compiled in installed.glob("*.so"):
        shutil.copy(compiled, folder / "vllm")
    if packages:
        subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder), *packages], check=True)
    # vLLM runs on a CPU where its version says so
    information = folder / f"vllm-{release}.dist-info" / "METADATA"
    information.write_text(information.read_text().replace(f"\nVersion: {release}\n", f"\nVersion: {release}+cpu\n", 1))


if __name__ == "__main__":
    unpack(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
