"""Describes the machine that a benchmark runs on, and the installed packages."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


def core_count() -> int | None:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of installed packages; if one is installed twice, that of the imported one."""
    installed = list(importlib.metadata.distributions())
    found = {d.name: d.version for d in reversed(installed)}
    return {name: found[name] for name in packages if name in found}


def cpu_model() -> str:
    """The processor's name, from Linux if possible."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


class Gpu(NamedTuple):
    """A GPU of this machine.

    Attributes:
      name: the vendor's name.
      memory: the bytes of its memory.
    """

    name: str
    memory: int


def find_gpu() -> Gpu | None:
    """The first GPU that nvidia-smi lists; None if there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        name, mebibytes = found.splitlines()[0].rsplit(",", 1)
        return Gpu(name.strip(), int(mebibytes) * 2**20)
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return None
