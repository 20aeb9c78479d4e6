"""Eight host devices for every test, and programs compiled quickly; set before JAX starts.

JAX_PLATFORMS=cuda,cpu runs the tests marked `device` on a GPU.
"""

import os

import pytest

from tests.xla_flags import with_devices

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = with_devices(8, os.environ.get("XLA_FLAGS", "")).strip()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each worker tests that stand together: they share what they trace and compile."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None
