"""The command that times optimizers works; no time is asserted."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from benchmarks import jax_optimizers, step_time, torch_optimizers, updates

TINY_LION_BYTES = 7_490_304


def run(tmp_path: Path, *optimizers: str) -> dict:
    output = tmp_path / "results" / "times.json"
    arguments = ["--model", "tiny", "--repeats", "2", "--output", str(output)]
    step_time.main([*arguments, *(("--optimizers", *optimizers) if optimizers else ())])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(output.read_text())


def test_times_and_bytes_of_each_optimizer_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tmp_path, "lion", "schedule_free")
    results = {result["name"]: result for result in report["results"]}
    assert list(results) == ["adamw", "lion", "schedule_free"]  # the baseline takes part always
    assert [r["library"] for r in results.values()] == ["optax", "memopt", "optax"]
    assert results["lion"]["state_bytes"] == report["parameter_bytes"] == TINY_LION_BYTES
    assert results["adamw"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert all(r["milliseconds"]["min"] > 0 for r in results.values())
    assert report["versions"]["jax"]
    assert report["command"].startswith("python -m benchmarks.step_time --model tiny --repeats 2")
    assert "schedule_free" in capsys.readouterr().out


def test_a_step_is_an_update_of_the_shared_parameters() -> None:
    shapes = {"up": {"kernel": jnp.zeros((8, 4))}}
    here = NamedSharding(jax.make_mesh((1,), ("data",)), jax.P())
    parameters = updates.Parameters(shapes, jax.tree.map(lambda _: here, shapes))
    before = parameters.values["up"]["kernel"] + 0
    parameters.contender("sgd", *step_time.optimizer("sgd")).step()
    expected = before - updates.LEARNING_RATE * parameters.gradients["up"]["kernel"]
    assert jnp.allclose(parameters.values["up"]["kernel"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "lino"], "did you mean 'lion'"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--model", "61m"], "did you mean '60m'"),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        step_time.main(arguments)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_optimizers, "installed", lambda: ())
    parameters = object.__new__(torch_optimizers.TorchParameters)
    with pytest.raises(ValueError, match="torch_lion needs the package lion-pytorch"):
        parameters.optimizer("torch_lion", 1e-3)
    monkeypatch.setattr(jax_optimizers, "installed", lambda: ())
    with pytest.raises(ValueError, match="flashoptim_lion needs the package flashoptim-jax"):
        jax_optimizers.build("flashoptim_lion", 1e-3, {})


def test_in_lists_each_block_has_arrays_of_its_own() -> None:
    stacked, apart = (
        updates.model_shapes("tiny", "float32", layout) for layout in ("stacked", "list")
    )
    assert len(apart["blocks"]) == 4
    assert apart["blocks"]["3"]["mlp"]["up"]["kernel"].shape == (192, 512)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (stacked, apart)]
    assert sizes[0] == sizes[1]


@pytest.mark.integrations
@pytest.mark.skipif(not jax_optimizers.installed(), reason="rollfast or flashoptim-jax is missing")
@pytest.mark.parametrize("name", jax_optimizers.installed())
def test_other_libraries_stand_beside(name: str) -> None:
    shapes = {"blocks": {"up": {"kernel": jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)}}}
    parameters = updates.on_one_device(shapes)
    before = parameters.values["blocks"]["up"]["kernel"] + 0
    other = jax_optimizers.JAX_OPTIMIZERS[name]
    tx = jax_optimizers.build(name, 0.1, shapes)
    contender = parameters.contender(name, other.package, tx, other.apply)
    contender.step()
    moved = jnp.abs(parameters.values["blocks"]["up"]["kernel"] - before)
    assert 1e-3 < float(moved.max()) < 1
    assert contender.state_bytes > 0


@pytest.mark.interop
def test_torch_stands_beside(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        names = torch_optimizers.installed()
        report = run(tmp_path, *names)
    assert "torch_adamw" in names
    results = {result["name"]: result for result in report["results"]}
    adamw, ours = results["torch_adamw"], results["adamw"]
    assert adamw["state_bytes"] == pytest.approx(ours["state_bytes"], rel=1e-3)
    assert adamw["library"] == "torch"
    assert results["torch_adafactor"]["state_bytes"] < 0.05 * report["parameter_bytes"]
