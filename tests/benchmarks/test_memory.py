"""The command that asks a chip's compiler for the peak of a step."""

import json

import pytest

from benchmarks import memory
from benchmarks.report import GIB
from memopt.planning import chips


@pytest.mark.parametrize(("chip", "extra"), [("v5e", "plan"), ("rtx4090", "plan-gpu")])
def test_a_missing_compiler_says_what_to_install(monkeypatch, chip, extra):
    monkeypatch.setattr(chips, "_versions", lambda *packages: [])
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'memopt\[{extra}\]'"):
        chips.devices(chip)


RESULTS = memory.Options().output.parent
V5E, RTX4090 = (
    json.loads((RESULTS / name).read_text())["results"]
    for name in ("memory.json", "memory_rtx4090.json")
)
BFLOAT16 = {"weights": None, "release": True, "mesh": None}
INT8 = {"weights": "int8", "release": True}


def the_one(results, like):
    """The record of which all that is true."""
    (found,) = (record for record in results if like.items() <= record.items())
    return found


@pytest.mark.parametrize(
    ("record", "most"),
    [
        ({"optimizer": "adafactor"} | BFLOAT16, 13.6),
        ({"optimizer": "adalomo"} | BFLOAT16, 13.6),
        ({"optimizer": "apollo_mini"} | BFLOAT16, 14.2),
        ({"optimizer": "adafactor", "model": "7b"} | INT8, 8.0),
        ({"optimizer": "adalomo"} | INT8, 8.0),
        ({"optimizer": "apollo_mini"} | INT8, 8.5),
        ({"optimizer": "adafactor", "model": "13b"} | INT8, 15.75),
        ({"optimizer": "adafactor", "mesh": "fsdp=16", "release": True}, 1.9),
    ],
)
def test_measured_peaks_on_a_v5e_stay_near_what_was_aimed_at(record, most):
    found = the_one(V5E, record)
    assert found["compiled_for"] == "v5e"
    assert found["peak_bytes"] <= most * GIB


def test_7b_in_int8_leaves_a_quarter_of_a_gpu_of_12_gb():
    found = the_one(RTX4090, {"optimizer": "adafactor", "model": "7b"} | INT8)
    assert found["peak_bytes"] <= 9e9


def test_every_row_says_which_compiler_made_it():
    assert {record["compiler"].split()[0] for record in V5E} == {"libtpu"}


@pytest.mark.tpu
@pytest.mark.parametrize(
    "like",
    [
        {"optimizer": "adafactor", "release": False, "mesh": None},
        {"optimizer": "adafactor"} | BFLOAT16,
        {"optimizer": "adafactor", "model": "7b"} | INT8,
        {"optimizer": "adafactor", "mesh": "fsdp=16", "release": True},
        {"optimizer": "apollo_mini", "release": False},
    ],
    ids=["ordinary", "released", "int8 weights", "fsdp", "int8 state"],
)
def test_a_row_is_still_what_the_compiler_says(like):
    """Measure the file again if this fails: the code has changed, or the compiler."""
    record = the_one(V5E, like)
    given = {name: record[name] for name in memory.Options._fields if name in record}
    found = memory.measure(record["optimizer"], memory.Options(**given))
    assert found["compiled_for"] == record["compiled_for"]
    assert found["parameter_bytes"] + found["gradient_bytes"] < found["peak_bytes"]
    assert found["peak_bytes"] == pytest.approx(record["peak_bytes"], rel=0.01), found["compiler"]


@pytest.mark.gpu
def test_a_released_step_needs_less_of_a_gpu_than_the_ordinary_one(capsys):
    def peak(*arguments: str) -> int:
        # In smaller models the embedding and the head outweigh the blocks.
        command = ["--model", "1b", "--optimizer", "adafactor", "--chip", "rtx4090", "--json"]
        memory.main([*command, *arguments])
        record = json.loads(capsys.readouterr().out)
        assert record["compiled_for"] == "rtx4090"
        assert record["peak_bytes"] > record["parameter_bytes"] + record["state_bytes"]
        return record["peak_bytes"]

    assert peak("--release") < 0.8 * peak()
