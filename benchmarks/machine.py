"""The machine that a benchmark ran on, and what was installed there."""

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
    """Of those that are installed; of one that is so twice that which is imported, the first."""
    installed = list(importlib.metadata.distributions())
    found = {d.name: d.version for d in reversed(installed)}
    return {name: found[name] for name in packages if name in found}


def cpu_model() -> str:
    """The processor's name, as Linux knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
