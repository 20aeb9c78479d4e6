"""Bytes a step moves on a TPU v5e, by its own compiler; needs the extra `aot`, but no TPU."""

import pytest

from benchmarks import traffic

pytestmark = pytest.mark.tpu


@pytest.mark.parametrize(
    ("name", "most"), [("apollo_mini", 4.05), ("lion", 5.05), ("adafactor", 6.05), ("adamw", 7.05)]
)
def test_bytes_accessed_over_parameter_bytes(name, most):
    record, _ = traffic.measure(name, traffic.Options())
    assert 3 < record["traffic"] <= most
    assert record["temp_bytes"] < 0.01 * record["parameter_bytes"]
