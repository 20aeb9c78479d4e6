"""The command that trains with several schedules, and what its curves say about the law."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import schedules
from memopt.schedules.laws import fit_annealing

STORED = schedules.Options().output


def test_the_annealing_law_predicts_the_other_schedules_within_1_percent() -> None:
    curves = schedules.curves(json.loads(STORED.read_text()))
    assert curves.keys() == schedules.SHAPES.keys()
    law = fit_annealing([curves[name] for name in schedules.FITTED], decay=schedules.DECAYS)
    for name in curves.keys() - {*schedules.FITTED}:
        rates, steps, losses = curves[name]
        assert law.predict(rates)[steps[-1] - 1] == pytest.approx(losses[-1], rel=0.01), name


def test_finished_runs_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(options: schedules.Options, name: str) -> list[float]:
        trained.append(name)
        return [2.0, 1.0]

    monkeypatch.setattr(schedules, "train", train)
    output = tmp_path / "schedules.json"
    command = ["--output", str(output), "--steps", "200", "--shapes", "constant"]
    schedules.main(command)
    schedules.main([*command, "linear"])
    assert trained == ["constant", "linear"]
    curves = schedules.curves(json.loads(output.read_text()))
    assert [*curves] == trained
    assert curves["linear"].steps.tolist() == [100, 200]
    assert curves["linear"].rates.argmax() == 100
    with pytest.raises(SystemExit, match=r"^error: steps must be 200, as of the runs in "):
        schedules.main([*command, "--steps", "300"])
    capsys.readouterr()


def test_rows_are_shuffled_over_all_batches() -> None:
    rows = np.arange(60).reshape(5, 4, 3)
    found = schedules._shuffled({"inputs": rows, "targets": rows + 1}, seed=0)
    assert sorted(found["inputs"].reshape(-1, 3).tolist()) == rows.reshape(-1, 3).tolist()
    assert (found["targets"] == found["inputs"] + 1).all()
    assert len({*(found["inputs"][0, :, 0] // 12)}) > 1  # the rows of a batch were of several
