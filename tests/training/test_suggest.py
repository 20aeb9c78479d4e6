"""`memopt suggest`: its table, what it refuses, and the noise of a run."""

import json
import math

import jax
import numpy as np
import pytest
from rich.console import Console

from memopt.cli.suggest import (
    Options,
    Suggestion,
    disagreements,
    parse_tokens,
    suggest,
    suggestions,
)
from memopt.models import llama
from memopt.schedules import laws
from memopt.text.tokenizer import load_tokenizer
from memopt.training import noise as measuring
from memopt.training.config import Architecture, Config, Optimization, Run, Text
from memopt.training.load import LoadedModel, load_run
from memopt.training.loop import train
from memopt.training.noise import measure_noise
from memopt.training.open import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A finished run of the nano model."""
    config = Config(
        architecture=Architecture(model="nano"),
        text=Text(data=(str(text),), batch_size=8, seq_len=32, eval_tokens=512),
        optimization=Optimization(optimizer="adamw", steps=4, learning_rate=1e-2),
        run=Run(output=tmp_path_factory.mktemp("suggest") / "run", mesh="data=1"),
    )
    train(open_run(config), Console(quiet=True))
    return config.run.output


def by_law(found):
    return {law["law"]: law for law in found["laws"]}


def test_step_law_is_suggested_in_tokens_rows_and_steps_within_its_range() -> None:
    found = suggestions(Options(model="350m", tokens="10B", seq_len=1024))
    block = 4 * 1024**2 + 3 * 1024 * 2736 + 2 * 1024
    assert found["parameters"] == 24 * block + 1024  # and the last norm
    law = by_law(found)["Step Law"]
    rate, batch = laws.step_law(found["parameters"], 1e10)
    assert (law["learning_rate"], law["batch_tokens"], law["outside"]) == (rate, batch, "")
    assert law["batch_rows"] == round(batch / 1024)
    assert law["steps"] == round(1e10 / law["batch_rows"] / 1024)


def test_a_point_outside_of_a_range_is_marked_and_disagreements_have_their_factor(capsys) -> None:
    suggest(["--model", "130m", "--tokens", "2.2B", "--batch-size", "256"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "84,953,856 parameters without embedding and head" in printed
    assert "OUTSIDE: parameters=8.5e+07 is not from 2e+08 to 1.1e+09" in printed
    assert "Batches disagree by a factor of 4.2: 125,182 tokens by Step Law" in printed
    assert "524,288 tokens by --batch-size" in printed
    assert "need a run: give --run" in printed


def test_laws_that_are_not_for_an_optimizer_say_so() -> None:
    found = suggestions(Options(model="350m", tokens="10B", optimizer="lion"))
    assert list(by_law(found)) == ["default of lion"]
    assert any("Step Law is not for lion" in line for line in found["not_used"])


def test_recommendations_that_are_alike_agree() -> None:
    rows = [
        Suggestion(law=law, learning_rate=rate, source="", range="")
        for law, rate in (("a", 1e-3), ("b", 1.4e-3))
    ]
    assert disagreements(rows) == ["Learning rates agree within a factor of 1.40."]


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


def test_the_noise_of_a_run_is_measured_at_its_loss(run, capsys) -> None:
    suggest(["--tokens", "1M", "--run", str(run), "--json"])
    found = json.loads(capsys.readouterr().out)
    noise, named = found["noise"], by_law(found)
    assert (noise["step"], noise["micro_batches"], noise["tokens_per_row"]) == (4, 128, 32.0)
    assert 0 < noise["loss"] < 6
    assert noise["low"] <= noise["rows"] <= (noise["high"] or math.inf)
    assert found["seq_len"] == 32
    assert named["noise scale"]["batch_tokens"] == pytest.approx(noise["rows"] * 32)
    assert named["surge"]["learning_rate"] >= 1e-2  # the run's rate, for a batch of 8 rows
    assert named["critical batch (Kaplan)"]["outside"]  # a loss of bytes
    assert "Time Transfer (weak)" in named
    assert not any("Time Transfer" in line for line in found["disagreements"])


def test_both_estimates_are_those_of_the_gradients_of_the_rows(run, monkeypatch) -> None:
    """Against the rows' gradients one by one, with their exact mean and variance."""
    loaded = load_run(run, "last", dequantize=True)
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
