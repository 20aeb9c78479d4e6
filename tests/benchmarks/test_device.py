"""The script for a GPU runs on a CPU, with little installed, and loses nothing that it measured."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.device import __main__ as device
from benchmarks.device import report, runner
from benchmarks.device.jobs import pieces
from benchmarks.machine import Gpu

NOT_INSTALLED = (
    *("grain", "tyro", "tensorboardX", "matplotlib", "safetensors", "datasets", "chex", "torch"),
    "apollo_torch",
)
PARTS = (("memory", "update", "release"), ("attention", "models", "tests"))
PIECES_THAT_TRAIN = ("memory", "release", "attention", "models")
ROOT = Path(__file__).parents[2]


def start(directory, output, chosen):
    """A small run, in processes that find no package but those that it may need."""
    hide = f"import sys\nsys.modules.update(dict.fromkeys({NOT_INSTALLED}))\n"
    (directory / "sitecustomize.py").write_text(hide)
    environment = os.environ | {"PYTHONPATH": f"{directory}:{ROOT}"}
    command = [sys.executable, "-m", "benchmarks.device", "--small", "--output", str(output)]
    command += ["--piece", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("chosen", PARTS, ids=" ".join)
def test_every_row_is_measured_once_and_reported(tmp_path, capsys, chosen):
    """One test, since the run takes minutes."""
    output = tmp_path / "device.json"
    printed = start(tmp_path, output, chosen).stdout
    rows = runner.read(output)
    expected = {(name, row) for name in chosen for job in pieces()[name] for row in job.names}
    assert {(row["piece"], row["name"]) for row in rows} == expected - {("update", "torch_adamw")}
    for row in rows:
        assert "error" not in row
        assert row["device"]
        assert row["seconds"] >= 0
        assert row["versions"]["jax"]
        assert row["command"].startswith("python -m benchmarks.device --small")
    assert all(report.TITLES[name] in printed for name in chosen)

    trained = [row for row in rows if "losses" in row]
    assert {row["piece"] for row in trained} == {*chosen} & {*PIECES_THAT_TRAIN}
    for row in trained:
        assert all(0 < loss < 10 for loss in row["losses"])
        assert row["compiler_bytes"] > row["parameter_bytes"] > 0
        assert row["tokens_per_second"] > 0

    before = output.read_text()
    assert start(tmp_path, output, chosen).stderr == ""
    assert output.read_text() == before

    device.main(["report", "--output", str(output)])
    printed = capsys.readouterr().out
    assert all(f"| {row['name']} " in printed for row in rows)
    (plot,) = tmp_path.glob("device_*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def collected(code, names, seconds=60.0):
    return list(runner.collect([sys.executable, "-c", code], names, dict(os.environ), seconds))


def test_a_process_that_dies_leaves_its_rows_and_an_error_for_the_others():
    code = """import os; print('{"name": "first"}', flush=True); os._exit(3)"""
    first, second = collected(code, ["first", "second"])
    assert first == {"name": "first"}
    assert second == {"name": "second", "error": "its process ended with 3."}


def test_a_process_that_takes_too_long_is_stopped():
    """And what it started, too: its end of the pipe is closed."""
    code = "import os, time; os.fork(); time.sleep(60)"
    start = time.monotonic()
    (row,) = collected(code, ["slow"], seconds=1.0)
    assert row == {"name": "slow", "error": "stopped after 1 s."}
    assert time.monotonic() - start < 30


def test_what_fails_is_a_row_and_the_next_runs(tmp_path, monkeypatch):
    """And it is measured again by the next run, what did not fail is not."""
    ran = []

    def job(piece, job, names, gpu, end):
        ran.extend(names)
        for name in names:
            failed = {"error": "ValueError: no."} if len(ran) == 1 else {}
            yield {"piece": piece, "name": name, "seconds": 0.0, **failed}

    monkeypatch.setattr(runner, "run_job", job)
    gpu, path = Gpu("a GPU", 10**11), tmp_path / "rows.json"
    first, second = (row for job in pieces()["memory"] for row in job.names)
    rows = runner.run(["memory"], gpu, path, "command", 900.0)
    assert [("error" in row, row["name"]) for row in rows] == [(True, first), (False, second)]
    assert "ValueError: no." in list(report.tables(rows)[-1].columns[1].cells)
    runner.run(["memory"], gpu, path, "command", 900.0)
    assert ran == [first, second, first]
    assert len(json.loads(path.read_text())["results"]) == 2
    runner.run(["memory"], Gpu("another GPU", 10**11), path, "command", 900.0)
    assert len(json.loads(path.read_text())["results"]) == 4


def test_a_job_may_take_its_part_of_the_gpu_and_never_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    gpu = Gpu("a GPU", 10**11)
    capped, free = pieces()["memory"][0], pieces()["attention"][1]
    environment = runner.environment_of(capped, gpu)
    assert float(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == 0.12
    assert environment["JAX_PLATFORMS"] == "cuda,cpu"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in runner.environment_of(free, gpu)


def test_no_device_is_touched_before_a_job_starts():
    """It would hold most of a GPU's memory: here there is no device that could be touched."""
    command = [sys.executable, "-c", "from benchmarks.device.jobs import pieces; pieces()"]
    environment = os.environ | {"JAX_PLATFORMS": "none"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def test_nothing_is_started_after_the_end():
    job = pieces()["memory"][0]
    (row,) = runner.run_job("memory", job, job.names, Gpu("a GPU", 10**11), end=0.0)
    assert row["error"] == runner.NOT_STARTED


def test_a_row_that_failed_is_not_replaced_by_one_that_was_not_started(tmp_path):
    path, gpu = tmp_path / "rows.json", Gpu("a GPU", 10**11)
    failed = {"device": gpu.name, "piece": "tests", "name": "pytest -m device", "error": "why"}
    path.write_text(json.dumps({"results": [failed]}))
    assert runner.run(["tests"], gpu, path, "command", 0.0) == [failed]


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_file_that_has_no_results_is_left_alone(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"error: .*rows\.json has no results"):
        device.main(["--small", "--output", str(path)])
    assert path.read_text() == content


def test_errors_and_kernels_are_printed_as_they_are(tmp_path, capsys):
    """Square brackets are markup to rich."""
    row = {"device": "a GPU", "piece": "memory", "name": "x", "seconds": 0.0}
    rows = [row | {"error": "no [/device:GPU:0]"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"results": rows}))
    device.main(["report", "--output", str(path)])
    assert "no [/device:GPU:0]" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(device, "find_gpu", lambda: None)
    with pytest.raises(SystemExit, match="--small"):
        device.main([])


def test_a_report_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"has no rows: run python -m benchmarks\.device first"):
        device.main(["report", "--output", str(tmp_path / "none.json")])
