"""A grid small enough to be run in a test."""

import pytest

from memopt.comparison import Protocol
from memopt.optimizers.registry import METHODS
from tests.training.conftest import compilation_cache as compilation_cache
from tests.training.nano import NANO, write_text


@pytest.fixture(autouse=True)
def registry():
    """Functions of users that a test enters leave the registry after it."""
    yield
    for name in [name for name, method in METHODS.items() if method.library == "user"]:
        del METHODS[name]


@pytest.fixture(scope="session")
def protocol(tmp_path_factory):
    """The protocol of runs of 20 steps."""
    text = write_text(tmp_path_factory.mktemp("text") / "words.txt")
    return Protocol(
        models={"nano": NANO},
        steps=20,
        batch_size=2,
        seq_len=16,
        data=(str(text),),
        eval_tokens=64,
        seeds=(0, 1),
        tuning_runs=2,
        baseline_runs=3,
        batch_sizes=(2, 4),
    )
