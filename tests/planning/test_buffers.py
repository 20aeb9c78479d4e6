"""Temporary arrays over time, read from a compiler's records that were written by hand."""

import pytest

from memopt.planning.buffers import Assignment, Files

#: Of each array: its place, its bytes, and the first and the last moment at which it is held.
ARRAYS = {"a": (0, 8, 0, 3), "b": (64, 100, 2, 2), "c": (0, 4, 5, 9), "d": (0, 4, 3, 3)}


@pytest.fixture
def assignment():
    kept = "".join(
        f" value: <1 {name} @0> (size={size},offset={place}): f32[{size // 4}]{{0}}\n"
        for name, (place, size, *_) in ARRAYS.items()
    )
    spans = "".join(f"    {name}{{}}:{a}-{b}\n" for name, (_, _, a, b) in ARRAYS.items())
    head = "allocation 0: size 164, preallocated-temp:\n"
    return Assignment(Files("ENTRY main {\n}\n", head + kept, spans))


def held(arrays):
    return [sum(one.bytes for one in some) for some in arrays]


def test_each_moment_has_what_is_held_and_one_array_at_a_place(assignment):
    assert held(assignment.over_time(100)) == [8, 8, 108, 8, 0, 4, 4, 4, 4, 4]


def test_a_part_of_the_program_is_shown_when_most_is_held(assignment):
    assert held(assignment.over_time(2)) == [108, 4]
    assert held(assignment.over_time(1)) == held([assignment.at_peak()]) == [108]


def test_a_program_without_temporaries_holds_nothing():
    nothing = Assignment(Files("ENTRY main {\n}\n", "", ""))
    assert nothing.over_time(5) == nothing.at_peak() == []
