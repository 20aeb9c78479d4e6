"""Eight host devices for every test, and programs compiled quickly; set before JAX starts.

JAX_PLATFORMS=cuda,cpu runs the tests marked `device` on a GPU.
"""

import gc
import os

import pytest

from tests.xla_flags import with_devices

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = with_devices(8, os.environ.get("XLA_FLAGS", "")).strip()

# Where an operation was written is of no use in what is compiled here, and takes time to find.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
gc.set_threshold(50_000, 20, 100)  # tracing makes many objects, and few that form cycles


def pytest_collection_finish():
    """Exempts imported modules from garbage collection, which some tests start often."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each worker tests that stand together: they share what they trace and compile."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")
