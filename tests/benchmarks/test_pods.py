"""The measured pods, and what is made of their records."""

import json

import pytest

from benchmarks import memory, pods

RESULTS = json.loads(pods.Options().output.read_text())["results"]
AS_LARGE = ("galore",)  # its bases, a quarter of a side squared for each matrix, are gathered
NOT_YET = ("galore",)  # of which rows are missing


def test_every_row_is_one_of_the_list():
    assert len(RESULTS) == len({pods.key(r) for r in RESULTS})
    known = {pods.key(r) for r in RESULTS}
    assert known <= set(pods.LIST)
    assert all(set(row) & set(NOT_YET) for row in set(pods.LIST) - known)


@pytest.mark.parametrize("record", RESULTS, ids=lambda r: pods.describe(pods.key(r)))
def test_an_optimizer_adds_a_hundredth_at_most_to_what_moves(record):
    more = pods.added(record, RESULTS)
    if more is not None and record["optimizer"] in AS_LARGE:
        assert 0.01 < more < 0.15
    elif more is not None:
        assert -0.01 < more <= 0.01


@pytest.mark.parametrize("record", RESULTS, ids=lambda r: pods.describe(pods.key(r)))
def test_it_fits_the_chip(record):
    assert record["parameter_bytes"] + record["state_bytes"] < record["peak_bytes"]
    assert record["compiled_for"] == record["chip"]
    assert record["peak_bytes"] < memory.HBM[record["chip"]] * memory.GIB


def test_a_program_that_cannot_be_read_moves_nobody_knows_what():
    assert set(pods.moved("", refresh=True).values()) == {None}


def test_what_is_added_is_told_by_the_same_step_of_sgd():
    names = dict.fromkeys(pods.KEY) | {"optimizer": "sgd", "collective_bytes": 200}
    other = names | {"optimizer": "lion", "collective_bytes": 201}
    assert pods.added(other, [names, other]) == pytest.approx(0.005)
    assert pods.added(other | {"mesh": "fsdp=4"}, [names, other]) is None
