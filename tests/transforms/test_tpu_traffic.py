"""Bytes a step moves on a TPU v5e, by its own compiler; needs the extra `plan`, but no TPU."""

import pytest

from benchmarks import traffic

pytestmark = pytest.mark.tpu


@pytest.mark.parametrize(
    ("name", "most", "temporary"),
    [
        *(("apollo_mini", 4.05, 0.01), ("lion", 5.05, 0.01), ("adafactor", 6.05, 0.01)),
        *(("adamw", 7.05, 0.01), ("adam_atan2", 7.05, 0.01)),
        *(("apollo", 4.5, 0.2), ("galore", 4.6, 0.2)),
        *(("flora", 5.3, 0.2), ("frugal", 5.5, 0.2)),
    ],
)
def test_bytes_accessed_over_parameter_bytes(name, most, temporary):
    record, _ = traffic.measure(name, traffic.Options())
    assert 3 < record["traffic"] <= most
    assert record["temp_bytes"] < temporary * record["parameter_bytes"]


def test_state_of_8_bits_is_read_and_written_in_the_one_pass_of_the_update():
    """Gradient, parameters there and back, and twice two bytes of moments: 4 sizes at least."""
    record, _ = traffic.measure("adamw", traffic.Options(state="int8"))
    assert 3.9 < record["traffic"] <= 4.3
    assert record["temp_bytes"] < 0.05 * record["parameter_bytes"]
