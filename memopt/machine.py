"""The machine that something was measured on, and the installed packages."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path


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
