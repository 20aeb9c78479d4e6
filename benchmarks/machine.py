"""Finds the GPU that a benchmark runs on."""

import subprocess
from typing import NamedTuple


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
