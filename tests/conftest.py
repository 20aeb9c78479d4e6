"""Eight host devices for every test, and programs compiled quickly; set before JAX starts.

JAX_PLATFORMS=cuda,cpu runs the tests marked `device` on a GPU.
"""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = " ".join(
        (
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
            # Most of the suite's time goes into LLVM; what it compiles runs for milliseconds.
            "--xla_backend_optimization_level=0",
            "--xla_cpu_parallel_codegen_split_count=1",
        )
    ).strip()
