"""Compiles for accelerators on a machine without them."""

import importlib.util
import math
import os
from typing import Literal, NamedTuple

import jax
from jax.experimental import topologies

Tpu = Literal["v5e", "v5p", "v6e"]
Gpu = Literal["h200", "a100-80", "rtx4090"]
Chip = Literal[Tpu, Gpu, "cpu"]

TPUS: dict[str, list[int]] = {"v5e": [2, 2], "v5p": [2, 2, 1], "v6e": [2, 2]}  # chips per host


class _Card(NamedTuple):
    """The properties of a GPU that its compiler needs.

    Attributes:
      capability: the compute capability, (major, minor).
      cores: the number of multiprocessors.
      lanes: float32 units per multiprocessor.
      threads: the maximum number of threads per multiprocessor.
      shared: KiB of shared memory per multiprocessor; a block may use all but one of them.
      cache: MiB of the second-level cache.
      clock: the clock rate in GHz.
      bandwidth: the memory bandwidth in GB per second.
      memory: the bytes of memory, as CUDA reports them.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared: int
    cache: int
    clock: float
    bandwidth: int
    memory: int

    def target(self) -> str:
        """The GPU as a `GpuTargetConfigProto` in text format."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores}
              fpus_per_core: {self.lanes}
              threads_per_core_limit: {self.threads}
              threads_per_block_limit: 1024
              threads_per_warp: 32
              block_dim_limit_x: {2**31 - 1}
              block_dim_limit_y: {2**16 - 1}
              block_dim_limit_z: {2**16 - 1}
              registers_per_core_limit: {2**16}
              registers_per_block_limit: {2**16}
              shared_memory_per_core: {self.shared * 2**10}
              shared_memory_per_block: {48 * 2**10}
              shared_memory_per_block_optin: {(self.shared - 1) * 2**10}
              l2_cache_size: {self.cache * 2**20}
              clock_rate_ghz: {self.clock}
              memory_bandwidth: {self.bandwidth * 10**9}
              device_memory_size: {self.memory}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
        """


GPUS = {
    "h200": _Card((9, 0), 132, 128, 2048, 228, 50, 1.98, 4800, 151_397_597_184),
    "a100-80": _Card((8, 0), 108, 64, 2048, 164, 40, 1.41, 2039, 85_100_068_864),
    "rtx4090": _Card((8, 9), 128, 128, 1536, 100, 72, 2.52, 1008, 25_386_352_640),
}


def devices(chip: str, count: int = 1) -> list[jax.Device]:
    """Returns devices to compile for; only "cpu" can run programs.

    Args:
      chip: one of `TPUS` or `GPUS`, or "cpu" for this machine.
      count: the number of devices.

    Raises:
      ModuleNotFoundError: if the compiler is not installed; names the package to install.
    """
    jax.config.update("jax_platforms", "cpu")  # only compilers run
    if chip == "cpu":
        return jax.devices()[:count]
    return (_gpus if chip in GPUS else _tpus)(chip, count)


def _tpus(chip: str, count: int) -> list[jax.Device]:
    """Chips of the smallest grid that has `count` of them; a grid has at least four."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for a TPU needs libtpu: pip install 'memopt[aot]'.")
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    sides = list(TPUS[chip])
    while math.prod(sides) < count:  # 2×2, 2×4, 4×4, ... chips; 2×2×1, 2×2×2, 2×2×4, ...
        sides[max(range(len(sides)), key=lambda i: (-sides[i], i))] *= 2
    grid = "x".join(map(str, sides))
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{grid}")
    return list(topology.devices)[:count]


def _gpus(chip: str, count: int) -> list[jax.Device]:
    """GPUs of one host."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise ModuleNotFoundError(
            "compiling for a GPU needs JAX's CUDA plugin: pip install 'memopt[aot-gpu]'."
        )
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=GPUS[chip].target(), topology=f"1x1x{count}"
    )
    return list(topology.devices)
