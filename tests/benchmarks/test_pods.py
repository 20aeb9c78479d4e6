"""The measured pods, and what is made of their records."""

import json

import pytest

from benchmarks import pods
from memopt.models import llama
from memopt.planning.chips import CHIPS
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


def adds_little(record):
    more = pods.added(record, RESULTS)
    least, most = least_and_most_added(record)
    return more is None or least < more <= most


def fits(record):
    least, most = record["parameter_bytes"] + record["state_bytes"], CHIPS[record["chip"]].memory
    return least < record["peak_bytes"] < most


def test_an_optimizer_adds_little_to_what_moves_and_its_step_fits_the_chip():
    rows = lambda holds: [pods.describe(pods.key(r)) for r in RESULTS if not holds(r)]
    assert rows(adds_little) == []
    assert rows(fits) == []
    assert rows(lambda record: record["compiled_for"] == record["chip"]) == []


def test_a_program_that_cannot_be_read_has_unknown_traffic():
    unknown = {"collectives": None, "refresh_collectives": None}
    assert set(pods.moved(unknown, refresh=True).values()) == {None}


def test_what_is_added_is_told_by_the_same_step_of_sgd():
    names = dict.fromkeys(pods.KEY) | {"optimizer": "sgd", "collective_bytes": 200}
    other = names | {"optimizer": "lion", "collective_bytes": 201}
    assert pods.added(other, [names, other]) == pytest.approx(0.005)
    assert pods.added(other | {"mesh": "fsdp=4"}, [names, other]) is None
