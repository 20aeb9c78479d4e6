"""Metrics are recorded and shown, also on a full disk."""

import io
import math
import struct
import warnings

import jax.numpy as jnp
import optax
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from memopt import diagnostics
from memopt.json_lines import read_json_lines
from memopt.training.metrics import DiagnosticsLog, Display, MetricsLog, StepLog
from memopt.training.report import plot_diagnostics
from memopt.training.trackers import Events
from memopt.training.writing import WriteError
from tests.training.disks import files_of_at_most

METRICS = {"loss": 1.5, "learning_rate": 1e-3, "gradient_norm": 2.0, "tokens_per_second": 9.0}


def read_events(directory):
    events = []
    for path in sorted(directory.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("Q", content, at)
            events.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += size + 16
    return events


def test_events_are_what_tensorboard_reads(tmp_path):
    log = MetricsLog(tmp_path, step=4)
    log.write(5, METRICS)
    log.close()
    version, start, step = read_events(tmp_path / "tensorboard")
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, start.session_log.START)
    assert step.step == 5
    values = {value.tag: value.simple_value for value in step.summary.value}
    assert values == pytest.approx(METRICS)


def test_events_that_cannot_be_written_are_warned_about_once(tmp_path):
    for directory in (tmp_path, tmp_path / "no directory" / "nor this"):
        with files_of_at_most(1000), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            events = Events(directory, start=1)
            for step in range(1, 200):
                events.write(step, METRICS)
            events.close()
        [warning] = warned
        assert str(warning.message).startswith("TensorBoard events cannot be written")


@pytest.mark.filterwarnings("ignore:TensorBoard events cannot:UserWarning")
def test_metrics_that_cannot_be_written_name_their_file_and_half_a_line_is_left_out(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    log.write(1, METRICS)
    path = tmp_path / "metrics.jsonl"
    size = path.stat().st_size
    with files_of_at_most(size + 30), pytest.raises(WriteError, match=r"metrics.jsonl' cannot"):
        log.write(2, METRICS)
    with files_of_at_most(size + 30), pytest.raises(WriteError, match=r"metrics.jsonl' cannot"):
        log.close()
    assert path.stat().st_size == size + 30
    assert read_json_lines(path) == [{"step": 1, **METRICS}]
    again = MetricsLog(tmp_path, step=1)
    again.write(2, METRICS)
    again.close()
    assert [line["step"] for line in read_json_lines(path)] == [1, 2]


def test_metrics_are_written_where_events_cannot_be(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.warns(UserWarning, match="^TensorBoard events cannot be written"):
        log = MetricsLog(tmp_path, step=0)
    log.write(1, METRICS)
    log.close()
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, **METRICS}]


def test_a_damaged_line_in_the_middle_is_warned_about_and_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st{"step": 2}\n\0\xff\0\n{"step": 3}\n')
    with pytest.warns(UserWarning, match="is damaged") as warned:
        assert read_json_lines(path) == [{"step": 1}, {"step": 3}]
    assert [str(w.message).split("line ")[1][0] for w in warned] == ["2", "3"]


@pytest.mark.parametrize("terminal", [False, True])
def test_each_validation_loss_has_a_line_that_stays(terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100)
    with Display(console, steps=9, start=0) as display:
        display.show(1, METRICS)
        display.show(2, METRICS | {"val_loss": 1.25})
        display.show(3, METRICS)
    lines = shown.getvalue().splitlines()
    assert sum(line.endswith("step 2/9  validation loss 1.2500") for line in lines) == 1
    assert sum("step 1/9" in line for line in lines) == (0 if terminal else 1)
    assert "0 s left" not in shown.getvalue()


def test_diagnostics_are_written_once_and_say_of_which_update_they_are(tmp_path):
    """A step that is skipped moves the next measurement, and is of no update."""
    names = {"ratio": diagnostics.update_to_weight()}
    tx = diagnostics.with_diagnostics(optax.sgd(0.5), names, every=2)
    params, log = {"w": jnp.ones((2, 2, 2))}, DiagnosticsLog(tmp_path, step=0, every=2)
    state = tx.init(params)
    log.see(1, state)  # a first step that was skipped
    for step in range(1, 8):
        if step != 2:
            _, state = tx.update({"w": params["w"] * step}, state, params)
        log.see(step, state)
    log.close()
    lines = read_json_lines(tmp_path / "diagnostics.jsonl")
    assert [(line["step"], line["updates"]) for line in lines] == [(1, 1), (5, 3), (7, 5)]
    assert [line["ratio"]["w"] for line in lines] == [[0.5, 0.5], [2.0, 2.0], [3.0, 3.0]]
    DiagnosticsLog(tmp_path, step=5, every=2).close()
    assert read_json_lines(tmp_path / "diagnostics.jsonl") == lines[:2]
    DiagnosticsLog(tmp_path / "other", step=0, every=0).see(1, state)
    assert not (tmp_path / "other").exists()


def test_numbers_that_are_not_finite_are_null_within_lists(tmp_path):
    log = StepLog(tmp_path / "values.jsonl", step=0)
    log.write(1, {"a": {"w": [1.0, math.nan], "b": math.inf}})
    log.close()
    assert read_json_lines(tmp_path / "values.jsonl") == [
        {"step": 1, "a": {"w": [1.0, None], "b": None}}
    ]


def test_diagnostics_without_a_line_are_not_plotted(tmp_path):
    DiagnosticsLog(tmp_path, step=0, every=2).close()
    with pytest.raises(ValueError, match=r"diagnostics.jsonl' has no line to plot"):
        plot_diagnostics(tmp_path / "diagnostics.jsonl", tmp_path / "diagnostics.png")
