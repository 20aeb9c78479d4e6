"""Flags of XLA for the tests; JAX is not imported here, as it reads them when it starts."""

import importlib.metadata
import importlib.util

# Most of the suite's time goes into compiling; what is compiled runs for milliseconds.
COMPILE_QUICKLY = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
has_libtpu = importlib.util.find_spec("libtpu") is not None  # ends at flags that it does not know
if importlib.metadata.version("jaxlib").startswith("0.10.") and not has_libtpu:
    # XLA's older emitter compiles two to five times as fast; jaxlib 0.11 no longer has it.
    COMPILE_QUICKLY.append("--xla_cpu_use_fusion_emitters=false")


def with_devices(count: int, given: str = "") -> str:
    """The value of XLA_FLAGS for so many devices of the host."""
    return " ".join([given, f"--xla_force_host_platform_device_count={count}", *COMPILE_QUICKLY])
