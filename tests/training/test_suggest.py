"""`memopt suggest`: its table, what it refuses, and the noise of a run."""

import json
import math

import jax
import numpy as np
import pytest
from rich.console import Console

from memopt.cli import suggest as command
from memopt.cli.suggest import Options, parse_tokens, suggest, suggestions
from memopt.models import llama
from memopt.optimizers.registry import METHODS
from memopt.schedules import laws
from memopt.text.tokenizer import load_tokenizer
from memopt.training import noise as measuring
from memopt.training.config import Architecture, Config, Optimization, Run, Text
from memopt.training.load import LoadedModel
from memopt.training.loop import train
from memopt.training.noise import measure_noise
from memopt.training.open import open_run


@pytest.fixture(scope="module")
def config(tmp_path_factory, text):
    """The options of a run of the nano model."""
    return Config(
        architecture=Architecture(model="nano"),
        text=Text(data=(str(text),), batch_size=8, seq_len=32, eval_tokens=512),
        optimization=Optimization(optimizer="adamw", steps=4, learning_rate=1e-2),
        run=Run(output=tmp_path_factory.mktemp("suggest") / "run", mesh="data=1"),
    )


@pytest.fixture(scope="module")
def loaded(config):
    """The model of such a run, as it was drawn."""
    model, tokenizer = llama.preset("nano"), load_tokenizer("bytes")
    params = llama.init_params(model)
    return LoadedModel(config.run.output, model, params, tokenizer, config=config, step=4)


def test_a_batch_is_shown_in_rows_and_steps_too() -> None:
    found = suggestions(Options(model="350m", tokens="10B", seq_len=1024))
    block = 4 * 1024**2 + 3 * 1024 * 2736 + 2 * 1024
    assert found["parameters"] == 24 * block + 1024  # and the last norm
    step_law, *_, default = found["laws"]
    rate, batch = laws.step_law(found["parameters"], 1e10)
    assert (step_law["learning_rate"], step_law["batch_tokens"]) == (rate, batch)
    assert step_law["batch_rows"] == round(batch / 1024)
    assert step_law["steps"] == round(1e10 / step_law["batch_rows"] / 1024)
    assert default["law"] == "default of adamw"


def test_what_is_outside_and_disagreements_are_printed(capsys) -> None:
    suggest(["--model", "60m", "--tokens", "2.2B", "--batch-size", "256"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "parameters without embedding and head" in printed
    assert "OUTSIDE: parameters=2.53e+07 is not from 6e+07 to 1.1e+09" in printed
    assert "Batches disagree by a factor of 4.2: 125,182 tokens by Step Law" in printed
    assert "524,288 tokens by the given batch" in printed
    assert "need a run: give --run" in printed


def test_a_function_of_ones_own_has_adamws_default() -> None:
    found = suggestions(Options(model="60m", tokens="2B", optimizer="optax:adam"))
    *_, last = found["laws"]
    assert last["law"] == "default of optax:adam"
    assert last["learning_rate"] == METHODS["adamw"].learning_rate


@pytest.mark.parametrize("text_", ["2.2X", "-1", "", "B", "nan", "inf", "0"])
def test_numbers_that_are_no_tokens_are_refused(text_) -> None:
    with pytest.raises(ValueError, match=r"tokens must be a number such as 2\.2B"):
        parse_tokens(text_)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1B"], "model must be given"),
        (["--model", "131m", "--tokens", "1B"], "did you mean '130m'"),
        (["--model", "130m", "--tokens", "1B", "--optimizer", "adamx"], "optimizer 'adamx'"),
        (["--model", "130m", "--tokens", "1B", "--batch-size", "0"], "batch_size must be at least"),
        (["--model", "130m", "--tokens", "1B", "--seq-len", "4096"], "seq_len=4096 is longer"),
        (["--model", "130m", "--tokens", "1000"], "less than one batch"),
        (["--tokens", "1B", "--run", "no/such/run"], "no/such/run"),
    ],
)
def test_what_cannot_be_suggested_is_refused_in_a_sentence(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        suggest(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert not printed.out


def test_the_noise_of_a_run_is_shown_with_what_follows_from_it(loaded, monkeypatch, capsys) -> None:
    scale = laws.NoiseScale(trace=8.0, square=0.5, batch=16.0)
    measured = measuring.MeasuredNoise(scale, scale, 8.0, math.inf, 2.5, 32.0, 128)
    monkeypatch.setattr(command, "load_run", lambda *_, **__: loaded)
    monkeypatch.setattr(command, "measure_noise", lambda loaded: measured)
    suggest(["--tokens", "1M", "--run", "runs/one", "--json"])
    found = json.loads(capsys.readouterr().out)
    named = {law["law"]: law for law in found["laws"]}
    assert found["seq_len"] == 32
    assert found["noise"]["step"] == 4
    assert (found["noise"]["rows"], found["noise"]["high"]) == (16.0, None)
    assert named["noise scale"]["batch_tokens"] == 16 * 32
    expected = laws.surge_peak([8 * 32], [1e-2], 16 * 32)  # the run's rate and batch
    assert named["surge"]["learning_rate"] == pytest.approx(expected)
    assert named["Time Transfer (weak)"]["batch_tokens"] == 16 * 32 * 1e6 / (4 * 8 * 32)
    suggest(["--tokens", "1M", "--run", "runs/one"])
    assert "is 16.0 rows (90%: 8.0 to no finite number)" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.slow  # the parts are tested by the other tests
def test_the_noise_of_a_trained_run_is_measured(config, capsys) -> None:
    train(open_run(config), Console(quiet=True))
    suggest(["--tokens", "1M", "--run", str(config.run.output), "--json"])
    found = json.loads(capsys.readouterr().out)
    noise = found["noise"]
    assert (noise["step"], noise["micro_batches"], noise["tokens_per_row"]) == (4, 128, 32.0)
    assert noise["low"] <= noise["rows"] <= (noise["high"] or math.inf)
    assert [law["law"] for law in found["laws"]][-1] == "default of adamw"


def test_both_estimates_are_those_of_the_gradients_of_the_rows(loaded, monkeypatch) -> None:
    """Against the rows' gradients one by one, with their exact mean and variance."""
    batches, real = [], measuring.open_batches

    def keep(*arguments):
        opened = real(*arguments)
        kept = [next(opened.batches) for _ in range(measuring.BATCHES)]
        batches.extend(kept)
        opened.batches.close()
        return opened._replace(batches=Kept(kept))

    monkeypatch.setattr(measuring, "open_batches", keep)
    monkeypatch.setattr(measuring, "BATCHES", 2)
    found = measure_noise(loaded)
    loss = lambda params, batch: llama.loss(llama.build_model(loaded.model_config, params), batch)
    gradient = jax.jit(
        lambda row: jax.flatten_util.ravel_pytree(
            jax.grad(lambda p: loss(p, row)[0] / loss(p, row)[1])(loaded.params)
        )[0]
    )
    traces, squares = [], []
    for batch in batches:
        rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(measuring.ROWS)]
        gradients = np.array([gradient(row) for row in rows], float)
        trace = gradients.var(axis=0, ddof=1).sum()
        traces.append(trace)
        squares.append((gradients.mean(axis=0) ** 2).sum() - trace / measuring.ROWS)
    np.testing.assert_allclose(found.by_rows[:2], [np.mean(traces), np.mean(squares)], rtol=1e-3)
    assert 0.3 < found.by_sizes.trace / found.by_rows.trace < 3
    assert found.low <= found.by_rows.batch <= found.high
    assert (found.micro_batches, found.tokens_per_row) == (2 * measuring.ROWS, 32.0)
    assert 0 < found.loss < 6


class Kept:
    """Batches that were made before."""

    def __init__(self, batches):
        self._batches = iter(batches)

    def __next__(self):
        return next(self._batches)

    def close(self):
        """Does nothing."""


def test_a_model_that_is_not_from_a_run_has_no_noise_to_measure(tmp_path) -> None:
    model = LoadedModel(tmp_path, llama.preset("tiny"), {}, load_tokenizer("bytes"))
    with pytest.raises(ValueError, match="must be a run"):
        measure_noise(model)
