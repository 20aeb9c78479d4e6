"""Schedules by name."""

import numpy as np
import pytest

from memopt import schedules


@pytest.mark.parametrize("name", schedules.available())
@pytest.mark.parametrize("warmup", [0, 10])
def test_warms_up_to_the_peak_and_ends_where_it_says(name, warmup):
    rate = schedules.schedule(name, 2.0, 100, warmup_steps=warmup, end_value=0.2)
    values = np.array([float(rate(t)) for t in range(121)])
    np.testing.assert_allclose(values[:warmup], 2.0 * np.arange(warmup) / max(warmup, 1), rtol=1e-6)
    assert values[warmup] == pytest.approx(2.0)
    assert values.max() == pytest.approx(2.0)
    end = 2.0 if name == "constant" else 0.2
    np.testing.assert_allclose(values[100:], end, rtol=1e-5)
    assert (np.diff(values[warmup:]) <= 1e-6).all()


def test_halfway_values():
    at = lambda name, t: float(schedules.schedule(name, 1.0, 100, decay_steps=None)(t))
    assert at("cosine", 50) == pytest.approx(0.5, abs=1e-6)
    assert at("cosine", 25) == pytest.approx((1 + np.cos(np.pi / 4)) / 2, abs=1e-6)
    assert at("linear", 25) == pytest.approx(0.75)
    assert [at("wsd", t) for t in (79, 80, 90)] == pytest.approx([1.0, 1.0, 0.5])


def test_errors():
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        schedules.schedule("cosin", 1.0, 100)
    with pytest.raises(ValueError, match="must leave room in steps=100"):
        schedules.schedule("linear", 1.0, 100, warmup_steps=100)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        schedules.schedule("constant", 1.0, 0)
