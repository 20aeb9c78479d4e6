"""The measured pods, and what is made of their records."""

import json

import pytest

from benchmarks import memory, pods
from benchmarks.report import GIB
from memopt.models import llama
from memopt.training.placement import parse_mesh

RESULTS = json.loads(pods.Options().output.read_text())["results"]


def test_every_row_is_measured_once():
    assert [pods.key(r) for r in RESULTS] == pods.LIST


def least_and_most_added(record):
    """A hundredth; more where matrices change places, or bases are gathered."""
    if record["optimizer"] != "galore":
        return -0.01, 0.01
    layers = llama.preset(record["model"]).num_layers
    by_stack = not record["release"] and layers % parse_mesh(record["mesh"])["fsdp"] == 0
    return 0.01, 1 / 20 if by_stack else 0.14


@pytest.mark.parametrize("record", RESULTS, ids=lambda r: pods.describe(pods.key(r)))
def test_an_optimizer_adds_little_to_what_moves(record):
    more = pods.added(record, RESULTS)
    least, most = least_and_most_added(record)
    assert more is None or least < more <= most


@pytest.mark.parametrize("record", RESULTS, ids=lambda r: pods.describe(pods.key(r)))
def test_it_fits_the_chip(record):
    assert record["parameter_bytes"] + record["state_bytes"] < record["peak_bytes"]
    assert record["compiled_for"] == record["chip"]
    assert record["peak_bytes"] < memory.HBM[record["chip"]] * GIB


def test_a_program_that_cannot_be_read_moves_nobody_knows_what():
    assert set(pods.moved("", refresh=True).values()) == {None}


def test_what_is_added_is_told_by_the_same_step_of_sgd():
    names = dict.fromkeys(pods.KEY) | {"optimizer": "sgd", "collective_bytes": 200}
    other = names | {"optimizer": "lion", "collective_bytes": 201}
    assert pods.added(other, [names, other]) == pytest.approx(0.005)
    assert pods.added(other | {"mesh": "fsdp=4"}, [names, other]) is None
