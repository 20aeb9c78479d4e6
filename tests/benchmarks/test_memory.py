"""The command that asks a chip's compiler for the peak of a step."""

import json

import pytest

from benchmarks import compilers, memory


@pytest.mark.parametrize(("chip", "extra"), [("v5e", "aot"), ("rtx4090", "aot-gpu")])
def test_a_missing_compiler_says_what_to_install(monkeypatch, chip, extra):
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'memopt\[{extra}\]'"):
        compilers.devices(chip)


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("optimizer", "options", "most"),
    [
        ("adafactor", {}, 13.6),
        ("adafactor", {"weights": "int8"}, 8.0),
    ],
)
def test_7b_fits_one_v5e_chip(optimizer, options, most):
    record = memory.measure(optimizer, memory.Options(release=True, **options))
    assert record["compiled_for"] == "v5e"
    assert record["parameter_bytes"] + record["gradient_bytes"] < record["peak_bytes"]
    assert record["peak_bytes"] <= most * memory.GIB


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
