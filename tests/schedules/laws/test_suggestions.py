"""Laws side by side: which recommend, what they say of their ranges, and where they disagree."""

import math

import pytest

from memopt.schedules import laws
from memopt.schedules.laws import MeasuredRun, Suggestion

RUN = MeasuredRun(
    loss=3.5,
    noise_batch=1e5,
    batch_tokens=2e4,
    tokens_seen=1e8,
    learning_rate=1e-3,
    optimizer="adamw",
    vocab_size=32_000,
)


def by_law(found):
    return {suggestion.law: suggestion for suggestion in found}


def test_step_law_and_power_are_suggested_within_their_ranges() -> None:
    found = by_law(laws.suggest(3e8, 1e10, width=1024))
    assert list(found) == ["Step Law", "power"]
    assert (found["Step Law"].learning_rate, found["Step Law"].batch_tokens) == laws.step_law(
        3e8, 1e10
    )
    batch = found["power"].batch_tokens
    assert batch == found["Step Law"].batch_tokens
    assert found["power"].learning_rate == laws.power(5e9, batch / 4096) / 4
    assert {x.outside for x in found.values()} == {""}


def test_a_point_outside_of_a_range_is_marked_and_not_warned_of() -> None:
    found = by_law(laws.suggest(3e7, 1e9, width=128))
    assert "parameters=3e+07 is not from 6e+07" in found["Step Law"].outside
    assert "tokens=1e+09" in found["Step Law"].outside
    assert "below the base width 256" in found["power"].outside


def test_a_batch_that_is_given_scales_step_laws_rate_and_disagrees_with_its_batch() -> None:
    found = laws.suggest(3e8, 1e10, width=1024, batch_tokens=2**20)
    rate, batch = laws.step_law(3e8, 1e10)
    scaled = by_law(found)["Step Law, √batch"]
    assert scaled.learning_rate == pytest.approx(rate * (2**20 / batch) ** 0.5)
    [_, batches] = laws.disagreements(found, 2**20)
    assert batches == (
        "Batches disagree by a factor of 3.5: 297,134 tokens by Step Law and 1,048,576 tokens by "
        "the given batch."
    )


def test_a_run_adds_what_its_noise_recommends() -> None:
    found = by_law(laws.suggest(3e8, 1e10, width=1024, run=RUN))
    assert found["noise scale"].batch_tokens == 1e5
    assert found["surge"].learning_rate == pytest.approx(
        laws.surge(1e5, 1e5, laws.surge_peak([2e4], [1e-3], 1e5))
    )
    assert found["critical batch (Kaplan)"].batch_tokens == laws.critical_batch(3.5)
    assert found["Time Transfer (weak)"].batch_tokens == 1e7
    assert not any("Time Transfer" in line for line in laws.disagreements([*found.values()]))
    given = by_law(laws.suggest(3e8, 1e10, width=1024, run=RUN, batch_tokens=4e5))
    assert "batch=4e+05 is not from 0 to 1e+05" in given["surge"].outside


def test_a_loss_of_bytes_is_outside_of_kaplans_range_and_not_compared() -> None:
    for loss, vocab_size, why in ((1.5, 264, "a vocabulary of 264"), (2.5, 32_000, "loss=2.5")):
        run = RUN._replace(loss=loss, vocab_size=vocab_size)
        critical = by_law(laws.suggest(3e8, 1e10, width=1024, run=run))["critical batch (Kaplan)"]
        assert why in critical.outside
        assert critical.compared == (vocab_size > 264)


@pytest.mark.parametrize("noise_batch", [math.inf, math.nan])
def test_noise_that_hides_the_gradient_recommends_no_batch(noise_batch) -> None:
    run = RUN._replace(noise_batch=noise_batch)
    found = by_law(laws.suggest(3e8, 1e10, width=1024, run=run))
    assert found["noise scale"].batch_tokens is None
    assert "hides the gradient" in found["noise scale"].outside
    assert not found.keys() & {"surge", "Time Transfer (weak)"}


def test_laws_that_are_not_for_an_optimizer_say_so() -> None:
    assert laws.suggest(3e8, 1e10, width=1024, optimizer="lion") == []
    said = laws.unused_laws("lion", None, None)
    assert [line.split(" is not")[0] for line in said[:2]] == ["Step Law", "The power law"]
    assert "need a run" in said[2]
    assert laws.unused_laws("lion", None, "adamw")[-1] == (
        "Surge needs a good learning rate of lion: the run used adamw."
    )
    assert "Surge is not for sgd" in laws.unused_laws("sgd", None, "sgd")[-1]
    assert "needs a batch" in laws.unused_laws("adam", None, "adam")[-1]
    assert laws.unused_laws("adamw", None, "adamw") == []


def test_recommendations_that_are_alike_agree() -> None:
    found = [
        Suggestion(law=law, learning_rate=rate, source="", range="")
        for law, rate in (("a", 1e-3), ("b", 1.4e-3))
    ]
    assert laws.disagreements(found) == ["Learning rates agree within a factor of 1.40."]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"width": 0}, "width must be above 0"),
        ({"width": 64, "batch_tokens": 0}, "batch_tokens must be above 0"),
    ],
)
def test_sizes_that_are_none_are_refused(given, says) -> None:
    with pytest.raises(ValueError, match=says):
        laws.suggest(3e8, 1e10, **given)
