"""`memopt plan --fit` with plans of a formula in place of a compiler's."""

import json

import jax
import pytest

from memopt.cli import plan as command
from memopt.cli.plan import plan_command
from memopt.planning.plan import Plan

GIB = 2**30


def planned(*, batch_size=1, mesh=None, release=False, weights=None, optimizer=None, **options):
    """16 GiB: 4 of weights and 2 of state on each chip of a mesh, 1.5 for a row."""
    if release and optimizer == "oasis":
        raise ValueError("oasis cannot be released.")
    if optimizer == "mkor" or batch_size == 5:
        raise jax.errors.JaxRuntimeError("INTERNAL: no tiles.")
    count = int(mesh.rpartition("=")[2]) if mesh else 1
    parameters = 4 * GIB // count // (2 if weights else 1)
    state = 2 * GIB // count
    activations = 3 * GIB * (batch_size or 1) // (2 * count)
    peak = parameters + state + activations
    return Plan(
        model="7b",
        optimizer=optimizer or "apollo_mini",
        chip="v5e",
        devices=count,
        compiled_for="v5e",
        compiler="" if optimizer == "soap" else "libtpu 1.0",
        peak_bytes=peak,
        parameter_bytes=parameters,
        state_bytes=state,
        gradient_bytes=0,
        activation_bytes=activations,
        temporary_bytes=0,
        program_bytes=0,
        limit_bytes=16 * GIB,
        fits=peak <= 16 * GIB and optimizer != "soap",
        margin_bytes=-GIB if optimizer == "soap" else 16 * GIB - peak,
        largest=(),
        over_time=(),
        traffic_bytes=3 * peak,
        collectives=None,
        refresh_collectives=None,
        notes=(),
        command="memopt pretrain",
    )


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(command, "plan", planned)


def run(capsys, *words):
    plan_command(["--model", "7b", *words])
    return capsys.readouterr().out


def test_the_largest_batch_with_both_sides_and_the_plan_of_it(capsys):
    out = run(capsys, "--fit", "batch-size")
    assert "The largest batch that fits is 6; 7 does not fit." in out
    assert "All smaller ones are assumed to fit." in " ".join(out.split())
    assert "7b with apollo_mini on v5e: fits, 15.00 GiB of 16.00 GiB, 1.00 GiB left" in out


def test_the_smallest_mesh(capsys):
    out = run(capsys, "--fit", "mesh", "--batch-size", "32")
    assert "The smallest mesh that fits is fsdp=4; fsdp=2 does not fit." in out
    assert "on 4 × v5e: fits" in out


def test_a_search_as_json(capsys):
    found = json.loads(run(capsys, "--fit", "batch-size", "--json"))
    assert (found["fits"], found["exceeds"]) == (6, 7)
    assert found["plans"]["7"]["peak_bytes"] == 16.5 * GIB


def test_optimizers_with_every_storage_and_the_reasons_why_some_cannot_be_planned(capsys):
    out = run(capsys, "--fit", "optimizer", "--optimizers", "lion", "oasis")
    lines = out.splitlines()
    assert len([line for line in lines if line.strip().startswith(("lion", "oasis"))]) == 8 + 4
    assert max(map(len, lines)) <= 80
    assert "12 of 12 fit." in out
    assert "cannot be planned: oasis: oasis cannot be released." in out


def test_what_the_compiler_fails_on_or_need_not_see_is_said(capsys):
    out = run(capsys, "--fit", "optimizer", "--optimizers", "mkor", "soap", "--release")
    assert "cannot be planned: mkor: the compiler failed: INTERNAL: no tiles." in out
    assert ">7.5" in out
    assert "0 of 4 fit." in out
    assert "weights and state alone exceed the chip" in out
    out = run(capsys, "--fit", "batch-size", "--accumulation", "5")
    assert "the compiler fails on 5, which counts as not fitting: INTERNAL: no tiles." in out
    assert "No batch fits: the smallest, 5, does not." in out


def test_what_is_given_restricts_the_table(capsys):
    method = ["--optimizers", "lion", "--release", "--weights", "int8"]
    rows = json.loads(run(capsys, "--fit", "optimizer", *method, "--json"))
    assert [(row["state"], row["weights"], row["release"]) for row in rows] == [
        (None, "int8", True),
        ("int8", "int8", True),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fit batch-size --batch-size 4", "--batch-size must be left out"),
        ("--fit mesh", "--fit mesh needs --batch-size"),
        ("--fit optimizer --option rank=4", "--option goes with one optimizer"),
        ("--fit optimizer --optimizers lino", "did you mean 'lion'"),
        ("--fit optimizer --processes 0", "processes must be at least 1"),
    ],
)
def test_options_that_do_not_go_together_end_with_a_sentence(capsys, words, message):
    with pytest.raises(SystemExit):
        plan_command(["--model", "7b", *words.split()])
    assert message in capsys.readouterr().err
