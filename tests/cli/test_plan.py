"""`memopt plan`: what it prints, own models and optimizers by name, and what it refuses."""

import json
import sys

import pytest

from memopt.cli.plan import plan_command
from tests.training import nano

OWN = """
import jax, jax.numpy as jnp, optax

def model():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, "float32")
    loss = lambda params, batch: (jnp.sum((batch @ params["w"]) ** 2), jnp.asarray(4))
    return {"w": shape(32, 16)}, loss, shape(4, 32)

def optimizer(learning_rate):
    return optax.adam(learning_rate)

def nothing(learning_rate):
    return 3

def wrong():
    return 3

def failing():
    return {}["missing"]
"""


@pytest.fixture(autouse=True, scope="module")
def preset():
    nano.install()
    yield
    nano.remove()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A module in the working directory."""
    (tmp_path / "own_module.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_module", None)


def test_it_prints_whether_a_step_fits_and_what_takes_the_memory(capsys):
    arguments = ["--model", "nano", "--chip", "cpu", "--optimizer", "adamw", "--seq-len", "16"]
    plan_command(arguments)
    printed = capsys.readouterr().out
    assert "nano with adamw on cpu: fits" in printed
    assert "│" in printed
    for part in ("weights", "optimizer state", "gradients", "activations", "temporaries", "peak"):
        assert part in printed
    assert "read and written a step" in printed
    assert "memopt pretrain --model nano --optimizer adamw --remat full" in printed
    plan_command([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"peak_bytes", "parameter_bytes", "state_bytes", "fits", "chip"} <= set(found)
    assert found["state_bytes"] > 2 * found["parameter_bytes"]


def test_a_model_and_an_optimizer_of_ones_own_are_named_by_their_functions(own, capsys):
    plan_command(
        ["--model=own_module:model", "--optimizer=own_module:optimizer", "--chip=cpu", "--json"]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["parameter_bytes"] == 4 * 32 * 16
    assert found["state_bytes"] == 2 * found["parameter_bytes"] + 2 * 4  # counts of updates


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nano", "--optimizers", "lion"], "--optimizers goes with --fit optimizer"),
        (["--model", "nano", "--processes", "1"], "--processes goes with --fit optimizer"),
        (
            ["--model", "nano", "--fit", "optimizer", "--optimizer", "lion"],
            "--optimizer must be left out",
        ),
        (["--model", "nanoo"], "model 'nanoo' is unknown; did you mean 'nano'"),
        (["--model", "no/directory"], "there is no directory 'no/directory'"),
        (["--model", "nano", "--chip", "v9"], "chip 'v9' is unknown"),
        (["--model", "nano", "--option", "rank"], "option 'rank' must be NAME=VALUE"),
        (["--model", "own_module:none"], "'own_module:none' must be MODULE:FUNCTION"),
        (["--model", "own_module:jax"], "'own_module:jax' must be MODULE:FUNCTION, got <module"),
        (["--model", "own_module:failing"], "'own_module:failing' failed (KeyError: 'missing')"),
        (["--model", "nano", "--num-layers", "0"], "num_layers must be at least 1, got 0"),
        (["--model", "nano", "--vocab-size", "0"], "vocab_size must be at least 1, got 0"),
        (["--model", "nano", "--seq-len", "0"], "seq_len must be at least 1, got 0"),
        (["--model", "own_module:wrong"], "must return (parameters, loss, batch), got int"),
        (
            ["--model", "nano", "--optimizer", "own_module:nothing"],
            "an optax.GradientTransformation, got int",
        ),
        (
            ["--model", "nano", "--optimizer", "own_module:wrong"],
            "'own_module:wrong' failed (TypeError: wrong() takes 0",
        ),
        (["--model", "own_module:model", "--seq-len", "8"], "--seq-len must be left out"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(own, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        plan_command(["--chip", "cpu", *arguments])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert not printed.out
