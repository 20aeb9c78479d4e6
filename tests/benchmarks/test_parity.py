"""The command that compares with the recorded runs."""

import json
from pathlib import Path

import pytest

from benchmarks import parity


def test_a_run_is_written_as_it_was_committed(tmp_path: Path) -> None:
    parity.main(["--runs", "lion", "--output", str(tmp_path / "lion.json")])
    [found] = json.loads((tmp_path / "lion.json").read_text())["results"]
    committed = json.loads(parity.Options().output.read_text())["results"]
    assert found == next(r for r in committed if r["run"] == "lion")


def test_an_error_too_large_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = parity.recorded_runs.errors
    worse = lambda *args: {
        leaf: {t: e + 3.1e-4 for t, e in at.items()} for leaf, at in errors(*args).items()
    }
    monkeypatch.setattr(parity.recorded_runs, "errors", worse)
    with pytest.raises(SystemExit, match="larger than their tolerance"):
        parity.main(["--runs", "lion", "--output", str(tmp_path / "lion.json")])


def test_an_unknown_run_is_named() -> None:
    with pytest.raises(SystemExit, match="did you mean 'lion'"):
        parity.main(["--runs", "lino"])
