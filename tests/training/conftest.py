"""The preset "nano", its text, and compiled programs kept from test to test."""

import copy
import functools
import json

import jax
import pytest

from memopt.training.describe import describe_controller, describe_run
from memopt.training.phases import follow
from tests.training import nano
from tests.training.compiled import kept_in


@pytest.fixture(autouse=True, scope="package")
def nano_preset():
    nano.install()
    yield
    nano.remove()


@pytest.fixture(autouse=True, scope="package")
def compilation_cache(tmp_path_factory):
    """Most of these tests compile the same few programs."""
    with kept_in(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of text."""
    return nano.write_text(tmp_path_factory.mktemp("text") / "words.txt")


#: Options of a run that its step is not compiled from; the last ones, if it has a controller.
OF_NO_STEP = {"output", "resume", "data", "mixture", "accept_data_change", "eval_tokens"}
OF_NO_STEP |= {"eval_every", "checkpoint_every", "keep", "log", "controller", "controller_option"}
OF_NO_STEP_STEERED = OF_NO_STEP | {"steps", "learning_rate", "warmup", "phases", "max_skipped"}


@pytest.fixture(autouse=True, scope="module")
def shared_setups():
    """Runs of the same options take the same step, which is traced and compiled once."""
    found = {}

    def share(config, **options):
        controller = describe_controller(config)
        carried, measure = config.phases[0].count, controller and [controller.measure]
        left_out = OF_NO_STEP_STEERED if controller else OF_NO_STEP
        of_step = {name: x for name, x in config.flat().items() if name not in left_out}
        key = json.dumps([of_step, carried, measure, options], default=str)
        if key not in found:
            setup = found[key] = describe_run(config, **options)
            kept = {"compile": functools.cache(setup.compile), "loss": jax.jit(setup.loss)}
            vars(setup).update(kept, jitted=setup.jitted, jit_init=functools.cache(setup.jit_init))
        setup = copy.copy(found[key])
        if controller:
            assert carried == 0
            vars(setup)["learning_rate"] = follow(config.phases)
        return setup

    with pytest.MonkeyPatch.context() as patch:
        for module in ("open", "load"):
            patch.setattr(f"memopt.training.{module}.describe_run", share)
        yield
