"""A grid small enough to be run in a test."""

import collections
import math

import pytest

from memopt.comparison import Protocol, worker
from memopt.comparison.cells import Outcome
from tests.training.conftest import compilation_cache as compilation_cache
from tests.training.nano import NANO, write_text


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
        batch_sizes=(2, 4),
    )


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by a loss that is least at a learning rate of 2^-7; counts the runs."""
    calls = collections.Counter()

    def train(cell, *, evaluate_pieces, alone):
        calls[cell.key] += 1
        loss = 2.0 + abs(math.log2(cell.learning_rate) + 7) + 100 / cell.steps
        pieces = [[cell.steps, loss]] * (20 if evaluate_pieces else 1)
        return Outcome(loss, pieces, False, 8, 4, 1, None, None, 0.5)

    monkeypatch.setattr(worker, "train", train)
    return calls


@pytest.fixture
def fail(trained, monkeypatch):
    """Makes a training raise an error, those of one optimizer or all after so many."""
    train = worker.train

    def start(error, *, optimizer=None, after=0):
        def failing(cell, **options):
            if optimizer in (None, cell.program.optimizer) and trained.total() >= after:
                raise error
            return train(cell, **options)

        monkeypatch.setattr(worker, "train", failing)

    return start
