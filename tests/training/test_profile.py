"""The steps of a trace are whole: the host waits before it starts and before it ends."""

import jax
import pytest
from rich.console import Console

from memopt.training.profile import Profile


@pytest.mark.parametrize(
    ("steps", "events"),
    [
        (0, [11, 12, 13, 14, 15, 16, 17]),
        (2, [11, 12, 13, "wait", "start", 14, 15, "wait", "stop", 16, 17]),
        (4, [11, 12, 13, "wait", "start", 14, 15, 16, 17, "stop"]),
    ],
)
def test_a_trace_starts_and_ends_where_no_step_runs(monkeypatch, tmp_path, steps, events):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    profile = Profile(tmp_path / "profile", Console(quiet=True), start=10, steps=steps)
    for step in range(11, 18):
        profile.before(step, lambda: seen.append("wait"))
        seen.append(step)
    profile.close()
    assert seen == events


def test_a_run_that_ends_before_says_how_many_steps_its_trace_has(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    said = []
    for last in (6, 7):
        profile = Profile(tmp_path / "profile", Console(soft_wrap=True), start=0, steps=4)
        for step in range(1, last + 1):
            profile.before(step, lambda: None)
        profile.close()
        said.append("".join(capsys.readouterr().out.split("\n")))
    assert said[0].endswith("profile, of 3 steps in place of 4: the run has ended")
    assert said[1].endswith("profile")


def test_a_trace_that_cannot_be_written_at_its_end_is_warned_about(monkeypatch, tmp_path):
    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no space left")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    profile = Profile(tmp_path / "profile", Console(quiet=True), start=0, steps=1)
    profile.before(4, lambda: None)
    with pytest.warns(UserWarning, match=r"the profile cannot be written \(.*no space left"):
        profile.before(5, lambda: None)
