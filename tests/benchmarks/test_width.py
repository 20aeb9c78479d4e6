"""The command that trains models of several widths."""

import json
from pathlib import Path

import pytest

from benchmarks import width


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
