"""Chips whose compilers run on a machine without them."""

import contextlib
import importlib.metadata
import math
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
from jax.experimental import topologies

from memopt.errors import check_choice

_GIB = 2**30


class Tpu(NamedTuple):
    """The properties of a TPU that its compiler needs; it knows the others.

    Attributes:
        grid: Chips of a host along each side.
        memory: Bytes of memory that a device's programs may use. The compiler says it when it
            refuses a program: "exceeds available HBM (15.75G)", libtpu 0.0.52.
        devices: JAX devices on a chip.
        options: More arguments of the topology.
    """

    grid: tuple[int, ...]
    memory: int
    devices: int = 1
    options: Mapping[str, str] = MappingProxyType({})


class Gpu(NamedTuple):
    """The properties of a GPU that its compiler needs.

    Attributes:
        capability: The compute capability, (major, minor).
        cores: The number of multiprocessors.
        lanes: Float32 units per multiprocessor.
        threads: The maximum number of threads per multiprocessor.
        shared: KiB of shared memory per multiprocessor; a block may use all but one of them.
        cache: Bytes of the second-level cache.
        clock: The clock rate in GHz.
        bandwidth: The memory bandwidth in bytes per second.
        memory: The bytes of memory, as CUDA reports them.
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
              l2_cache_size: {self.cache}
              clock_rate_ghz: {self.clock}
              memory_bandwidth: {self.bandwidth}
              device_memory_size: {self.memory}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
        """


TPUS = {
    # By default libtpu compiles for one core of a v4; JAX joins the two of a chip.
    "v4": Tpu((2, 2, 1), int(30.75 * _GIB), options={"chip_config_name": "megacore"}),
    "v5e": Tpu((2, 2), int(15.75 * _GIB)),
    "v5p": Tpu((2, 2, 1), int(95.73 * _GIB)),
    "v6e": Tpu((2, 2), int(31.24 * _GIB)),
    "tpu7x": Tpu((2, 2, 1), int(94.74 * _GIB), devices=2),  # Ironwood
}

# A100, H100, H200 and B200: the target configurations of XLA, xla/backends/gpu/target_config/specs
# Others: what deviceQuery prints on them, in public reports; bandwidths from NVIDIA's data sheets.
# The memory of the 40 GB A100 and the H200, nominal in XLA's files, is deviceQuery's and PyTorch's.
# The memory that CUDA reports varies by 1% with the driver.
_HOPPER = ((9, 0), 132, 128, 2048, 228, 50 * 2**20, 1.98)
_A100 = ((8, 0), 108, 64, 2048, 164, 40 * 2**20, 1.41)
_RTX = (128, 1536, 100)  # lanes, threads and shared memory
GPUS = {
    "a100-40": Gpu(*_A100, 1_555_200_000_000, 42_298_834_944),
    "a100-80": Gpu(*_A100, 2_039_040_000_000, 85_100_068_864),
    "h100": Gpu(*_HOPPER, 3_352_320_000_000, 84_942_979_072),
    "h200": Gpu(*_HOPPER, 4_800_000_000_000, 143_156 * 2**20),
    "b200": Gpu(
        *((10, 0), 148, 128, 2048, 228, 132_644_864, 1.965, 7_672_320_000_000, 191_514_411_008)
    ),
    "l40s": Gpu((8, 9), 142, *_RTX, 96 * 2**20, 2.52, 864_000_000_000, 47_576_711_168),
    "rtx3090": Gpu((8, 6), 82, *_RTX, 6 * 2**20, 1.74, 936_000_000_000, 25_411_846_144),
    "rtx4090": Gpu((8, 9), 128, *_RTX, 72 * 2**20, 2.52, 1_008_000_000_000, 25_386_352_640),
    "rtx5090": Gpu((12, 0), 170, *_RTX, 96 * 2**20, 2.655, 1_792_000_000_000, 33_677_180_928),
}

#: Chips by name, with the bytes of memory of a device as `memory`.
CHIPS: dict[str, Tpu | Gpu] = TPUS | GPUS


#: Chips by what JAX calls their devices: the names of libtpu, and those of CUDA.
KINDS = {
    "cpu": "cpu",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
}


def devices(chip: str, count: int = 1) -> list[jax.Device]:
    """Returns devices to compile for; only "cpu" can run programs.

    Args:
        chip: A name in `CHIPS`, or "cpu" for this machine.
        count: The number of devices.

    Raises:
        ModuleNotFoundError: If the compiler is not installed; names the package to install.
        ValueError: If the chip is unknown, or this machine has fewer devices than `count`.
    """
    compiler(chip)
    if chip == "cpu":
        flag = "--xla_force_host_platform_device_count"
        if count > 1 and flag not in os.environ.get("XLA_FLAGS", ""):
            with contextlib.suppress(RuntimeError):  # JAX has looked for devices already
                jax.config.update("jax_num_cpu_devices", count)
        if count > (here := len(jax.devices("cpu"))):
            raise ValueError(
                f"a mesh of {count} devices needs as many on this machine, which has {here}: "
                f"set XLA_FLAGS={flag}={count} before JAX starts."
            )
        return jax.devices("cpu")[:count]
    return (_gpus if chip in GPUS else _tpus)(chip, count)


def only_compile() -> None:
    """Keeps this process and those it starts off the machine's accelerators and their memory.

    Call it before JAX starts, in a program that compiles and runs nothing. Compilers' warnings,
    such as of a step that takes more than the memory, are hidden; their errors are shown.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # which JAX sets if nobody does
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    jax.config.update("jax_platforms", "cpu")


def compiler(chip: str) -> str:
    """Returns the name and version of a chip's compiler.

    Args:
        chip: A name in `CHIPS`, or "cpu" for this machine.

    Raises:
        ModuleNotFoundError: If the compiler is not installed; names the package to install.
        ValueError: If the chip is unknown.

    Example:
        >>> compiler("cpu").split()[0]
        'jaxlib'

    """
    check_choice("chip", chip, [*CHIPS, "cpu"])
    if chip in TPUS:
        found = _versions("libtpu", "libtpu-nightly")
        missing = "compiling for a TPU needs libtpu: pip install 'memopt[plan]'."
    elif chip in GPUS:
        found = _versions("jax-cuda13-plugin", "jax-cuda12-plugin")
        missing = "compiling for a GPU needs JAX's CUDA plugin: pip install 'memopt[plan-gpu]'."
    else:
        found, missing = _versions("jaxlib"), ""
    if not found:
        raise ModuleNotFoundError(missing)
    return found[0]


def compilable(chip: str) -> tuple[str, tuple[str, ...]]:
    """Returns the chip to compile for in place of another, and sentences that say why.

    It is the chip itself if its compiler is installed, and "cpu" if not.

    Raises:
        ValueError: If the chip is unknown.
    """
    try:
        compiler(chip)
    except ModuleNotFoundError as error:
        return "cpu", (f"{error} Compiled for this machine's CPU instead.",)
    return chip, ()


def _versions(*packages: str) -> list[str]:
    """The names and versions of those packages that are installed."""
    found = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return found


def _tpus(chip: str, count: int) -> list[jax.Device]:
    """Devices of the smallest grid that has `count` of them; a grid has at least a host."""
    os.environ |= {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    tpu = TPUS[chip]
    sides = list(tpu.grid)
    while tpu.devices * math.prod(sides) < count:  # 2×2, 2×4, 4×4, ...; 2×2×1, 2×2×2, 2×2×4, ...
        sides[max(range(len(sides)), key=lambda i: (-sides[i], i))] *= 2
    grid = "x".join(map(str, sides))
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:{grid}", **tpu.options
    )
    return list(topology.devices)[:count]


def _gpus(chip: str, count: int) -> list[jax.Device]:
    """GPUs of one host, or of several with eight each."""
    hosts = -(-count // 8)
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=GPUS[chip].target(),
        topology=f"1x{hosts}x{count if hosts == 1 else 8}",
    )
    return list(topology.devices)[:count]
