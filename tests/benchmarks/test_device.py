"""The script for a GPU runs on a CPU, with little installed, and loses nothing that it measured."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.device import __main__ as device
from benchmarks.device import report, runner, training, updates
from benchmarks.device.jobs import pieces
from benchmarks.machine import Gpu
from benchmarks.training_step import TrainingStep
from memopt import codecs
from memopt.machine import cpu_model
from memopt.models.config import preset

# What the script says it needs, and pytest for its tests.
NEEDED = ("jax", "flax", "optax", "orbax-checkpoint", "tokenizers", "rich", "pytest")
PIECES_THAT_TRAIN = ("memory", "release", "attention", "models")
ROOT = Path(__file__).parents[2]
# Rows that run what no other row runs. The others differ from them by an optimizer or a codec.
DISTINCT = {
    "memory": ("apollo_mini, released, int8 weights and state",),
    "update": ("copy", "optax.adamw", "galore, a refresh"),
    "release": ("adamw, ordinary, largest batch",),
    "attention": (
        *("2048 tokens, as trained", "2048 tokens, in chunks", "profile of a training step"),
    ),
    "models": (),
    "tests": ("pytest -m device",),
}


def all_rows():
    return {(name, row) for name, jobs in pieces().items() for job in jobs for row in job.names}


def modules_not_needed():
    """The installed modules that no needed distribution, and none that it requires, provides."""
    needed, found = list(NEEDED), set()
    while needed:
        name = canonicalize_name(needed.pop())
        if name not in found:
            found.add(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or ())
            needed += [x.name for x in requirements if not x.marker or x.marker.evaluate()]
    providers = importlib.metadata.packages_distributions().items()
    return [module for module, of in providers if found.isdisjoint(map(canonicalize_name, of))]


def start(directory, output, every_row):
    """A small run, in processes that find no package but those that it needs."""
    hide = f"import sys\nsys.modules.update(dict.fromkeys({modules_not_needed()}))\n"
    (directory / "sitecustomize.py").write_text(hide)
    environment = os.environ | {"PYTHONPATH": f"{directory}:{ROOT}"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # Jobs compile the same programs of tiny shapes.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(directory / "compiled")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if not every_row:  # of the tests for a device, one case of each
        kinds = ("adafactor", "apollo", "galore", "muon", "bfloat16", "float8", "quantized")
        kinds += ("released",)  # rows above are
        environment["PYTEST_ADDOPTS"] = f"-k '{' and '.join(f'not {kind}' for kind in kinds)}'"
    command = [sys.executable, "-m", "benchmarks.device", "--small", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("every_row", [False, True], ids=["distinct", "every"])
def test_rows_that_a_file_lacks_are_measured_once_and_reported(tmp_path, capsys, every_row):
    """One test, since the run takes a minute, and of every row five."""
    output = tmp_path / "device.json"
    expected = all_rows() - {("update", "torch_adamw")}
    distinct = {(piece, row) for piece, names in DISTINCT.items() for row in names}
    assert distinct <= expected
    known = set() if every_row else expected - distinct
    about = {"device": cpu_model(), "seconds": 0.0}
    before = [{"piece": piece, "name": name, **about} for piece, name in sorted(known)]
    output.write_text(json.dumps({"results": before}))
    printed = start(tmp_path, output, every_row).stdout
    rows = runner.read(output)
    assert {(row["piece"], row["name"]) for row in rows} == expected
    assert rows[: len(before)] == before
    for row in rows[len(before) :]:
        assert "error" not in row
        assert row["device"]
        assert row["seconds"] >= 0
        assert row["versions"]["jax"]
        assert row["command"].startswith("python -m benchmarks.device --small")
    assert all(title in printed for title in report.TITLES.values())

    trained = [row for row in rows if "losses" in row]
    with_rows = {piece for piece in PIECES_THAT_TRAIN if every_row or DISTINCT[piece]}
    assert {row["piece"] for row in trained} == with_rows
    for row in trained:
        assert all(0 < loss < 10 for loss in row["losses"])
        assert row["compiler_bytes"] > row["parameter_bytes"] > 0
        assert row["tokens_per_second"] > 0

    before = output.read_text()
    assert start(tmp_path, output, every_row).stderr == ""
    assert output.read_text() == before

    device.main(["report", "--output", str(output)])
    printed = capsys.readouterr().out
    assert all(f"| {row['name']} " in printed for row in rows)
    (plot,) = tmp_path.glob("device_*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_a_row_measures_can_be_set_up():
    """Rows that are not run above have a model, an optimizer and codecs that there are."""
    jobs = (job.measure.keywords for job in (*training.MEMORY, *training.RELEASE, *training.MODELS))
    for options in (
        *(job["options"] for job in jobs if "options" in job),
        *training.TURNS.values(),
    ):
        TrainingStep(training.shrunk(options, small=True), jax.devices())
        preset(options.model)
    for case in updates.CASES.values():
        jax.eval_shape(case.build().init, {"w": jnp.ones((8, 16))})
        assert case.weights is None or codecs.named(case.weights)


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
