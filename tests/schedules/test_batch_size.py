"""Schedules of the batch size."""

import math

import numpy as np
import pytest

from memopt import schedules


def test_a_ramp_is_the_line_rounded_down():
    grow = schedules.batch_schedule("ramp", 2, 9, 50)
    line = np.interp(np.arange(80), [0, 50], [2, 9])
    assert [grow(used) for used in range(80)] == [math.floor(x + 1e-9) for x in line]


@pytest.mark.parametrize(("first", "last"), [(1, 8), (3, 24), (1, 6), (5, 5), (2, 3)])
def test_doubling_doubles_after_equal_parts_up_to_the_last(first, last):
    grow = schedules.batch_schedule("doubling", first, last, 60)
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    parts = max(len(sizes) - 1, 1)
    for i, size in enumerate(sizes):
        begin = math.ceil(i * 60 / parts)
        assert grow(begin) == size
        assert i == 0 or grow(begin - 1) == sizes[i - 1]
    assert grow(10**15) == last


@pytest.mark.parametrize("name", schedules.batch_names())
def test_batches_are_whole_and_never_shrink(name):
    grow = schedules.batch_schedule(name, 1, 7, 33)
    sizes = [grow(used) for used in range(50)]
    assert all(type(size) is int for size in sizes)
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[33]) == (1, 7)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("rmap", 1, 2, 3), "did you mean 'ramp'"),
        (("ramp", 0, 2, 3), "first must be at least 1, got 0"),
        (("ramp", 4, 2, 3), "last must be at least 4, got 2"),
        (("ramp", 1, 2, 0), "length must be at least 1, got 0"),
        (("ramp", 1, 2.5, 10), "last must be a whole number, got 2.5"),
    ],
)
def test_what_is_no_growing_batch_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        schedules.batch_schedule(*given)
