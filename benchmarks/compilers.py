"""The compilers of accelerators, on a machine that has none."""

import importlib.util
import math
import os

import jax
from jax.experimental import topologies

TPUS = {"v5e": [2, 2], "v5p": [2, 2, 1], "v6e": [2, 2]}  # the chips of a host


def tpu_devices(chip: str, count: int = 4) -> list[jax.Device]:
    """Chips to compile for, of the smallest grid that has so many.

    Args:
      chip: "v5e", "v5p" or "v6e".
      count: how many are needed; a grid has at least four.

    Raises:
      ModuleNotFoundError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for a TPU needs libtpu: pip install 'memopt[aot]'.")
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles here, and runs nothing
    sides = list(TPUS[chip])
    while math.prod(sides) < count:  # 2×2, 2×4, 4×4, ... chips
        sides[sides[0] == sides[1]] *= 2
    grid = "x".join(map(str, sides))
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{grid}")
    return list(topology.devices)[:count]
