"""The command that trains models of several widths, and what it found."""

import json
from pathlib import Path

import pytest

from benchmarks import width

STORED = width.Options().output


def test_the_best_learning_rate_stays_under_mup_and_moves_without() -> None:
    """In powers of two; the base width is the same run."""
    report = json.loads(STORED.read_text())
    best = width.best(report["results"])
    assert best == {k: {int(w): r for w, r in v.items()} for k, v in report["best"].items()}
    assert best["mup"].keys() == best["global"].keys() == {64, 128, 256}
    assert all(abs(rate - best["mup"][64]) <= 1 for rate in best["mup"].values())
    assert best["global"][256] <= best["global"][64] - 2
    # What the best rate of the base costs the widest model, in nats.
    excess = {}
    for scheme in ("mup", "global"):
        at = width.losses(report["results"])[scheme, 256]
        excess[scheme] = at[best[scheme][64]] - min(at.values())
    assert excess["mup"] < excess["global"] / 2


def test_finished_runs_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(options: width.Options, *run: str | int) -> float:
        trained.append(run)
        return 1.0

    monkeypatch.setattr(width, "train", train)
    output = tmp_path / "width.json"
    command = ["--widths", "8", "16", "--rates", "-3", "-2", "--output", str(output)]
    width.main([*command, "--schemes", "mup"])
    assert trained == [("mup", d, rate, 0) for d in (8, 16) for rate in (-3, -2)]
    report = json.loads(output.read_text())
    assert report["best"] == {"mup": {"8": -3, "16": -3}}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    trained.clear()
    width.main([*command, "--schemes", "mup", "global"])
    assert trained == [("global", 16, rate, 0) for rate in (-3, -2)]
    assert "global" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="steps must be 300, as of the runs in"):
        width.main([*command, "--steps", "7"])
    with pytest.raises(SystemExit, match="did you mean 'mup'"):
        width.main([*command, "--schemes", "mups"])
