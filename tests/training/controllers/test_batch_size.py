"""Controllers of the batch size: their decisions by hand, and exact on a linear regression."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memopt.schedules.laws import noise_scale
from memopt.training.control import Plan, Seen
from memopt.training.controllers import controller
from memopt.training.controllers.adadagrad import inner_product_test, norm_test
from memopt.training.step import init_state, train_step

PLAN = Plan(
    steps=64,
    warmup_steps=4,
    learning_rate=1e-3,
    batch_size=8,
    accumulation=2,
    sources={"": 1.0},
)


def seen(step, batches, micro_square=2.0, norm=1.0, dot_square=1.0, skipped=0, last=1):
    metrics = {
        "micro_square": micro_square,
        "micro_dot_square": dot_square,
        "gradient_norm": norm,
        "skipped_in_row": skipped,
    }
    return Seen(step, batches, metrics, step_batches=last)


def decide(name, told, **options):
    """The batches of each next step; the state goes through JSON, as in a checkpoint."""
    made = controller(name, PLAN, options)
    state, found = made.init(), []
    for what in (Seen(0, 0, {}), *told):
        state, control = made.update(json.loads(json.dumps(state)), what, None)
        found.append(control.batches)
    return found


def test_the_norm_test_by_hand():
    """Two micro-batches of 4 rows: the variance of a row is 4 · 2 · (2 − 1) = 8, of ‖ḡ‖² = 1."""
    assert decide("adadagrad", [seen(1, 1)], eta=1.0) == [1, 1]  # 8 rows are a batch
    assert decide("adadagrad", [seen(1, 1)], eta=0.7) == [1, 4]  # 16.3 rows: 3 batches, 4 of 2^n
    assert decide("adadagrad", [seen(1, 1)], eta=0.7, most=3) == [1, 3]
    assert decide("adadagrad", [seen(1, 1)], eta=1e-9) == [1, 16]


def test_variances_are_those_of_as_many_micro_batches_as_were_taken():
    """Eight in the second step: a row's variance is 4 · 8/7 · (5 − 1) = 18.3; of two, 32."""
    told = [seen(1, 1), seen(2, 5, micro_square=5.0, last=4)]
    assert decide("adadagrad", told, eta=0.7) == [1, 4, 8]  # 37 rows are 5 batches; 65 are 9


@pytest.mark.parametrize(
    ("name", "options", "metrics"),
    [
        ("adadagrad", {"eta": 0.5}, {"tested_rows": 32.0}),
        ("noise_ramp", {}, {"noise_scale": math.inf}),  # tr Σ is 8, and ‖G‖² 0
    ],
)
def test_what_they_act_on_is_recorded(name, options, metrics):
    made = controller(name, PLAN, options)
    assert made.update(made.init(), seen(1, 1), None)[1].metrics == metrics
    assert made.update(made.init(), seen(1, 1, skipped=1), None)[1].metrics == {}


def test_the_batch_never_shrinks():
    told = [seen(1, 1), seen(2, 5, micro_square=1.0, last=4)]
    assert decide("adadagrad", told, eta=0.7) == [1, 4, 4]


def test_the_inner_product_test_by_hand():
    """Along ḡ: 8 · (1.5 − 1) = 4; across: 8 · (2 − 1.5 / 1) = 4."""
    options = {"test": "inner_product"}
    told = [seen(1, 1, dot_square=1.5)]
    assert decide("adadagrad", told, theta=1.0, nu=1.0, **options) == [1, 1]
    assert decide("adadagrad", told, theta=0.5, nu=1.0, **options) == [1, 2]  # 16 rows
    assert decide("adadagrad", told, theta=1.0, nu=0.4, **options) == [1, 4]  # 25 rows


@pytest.mark.parametrize("name", ["adadagrad", "noise_ramp"])
@pytest.mark.parametrize(
    "bad",
    [
        {"skipped": 1},
        {"micro_square": math.nan},
        {"micro_square": math.inf},
        {"norm": math.inf, "skipped": 0},
    ],
)
def test_a_step_that_was_not_applied_or_is_not_finite_changes_nothing(name, bad):
    options = {"eta": 0.7} if name == "adadagrad" else {"decay": 0.1}
    noisy = {"micro_square": 1e6}
    told = [seen(1, 1), seen(2, 5, **(noisy | bad), last=4), seen(3, 9, last=4)]
    assert decide(name, told, **options)[2] == decide(name, told, **options)[1]
    without = decide(name, [told[0], seen(2, 5, last=4)], **options)
    assert decide(name, told, **options)[3] == without[2]


def test_no_gradient_at_all_does_not_divide_by_nothing():
    for test in ("norm", "inner_product"):
        none = seen(1, 1, micro_square=0.0, norm=0.0, dot_square=0.0)
        cancelled = seen(1, 1, micro_square=1.0, norm=0.0, dot_square=0.0)
        assert decide("adadagrad", [none], test=test) == [1, 1]
        assert decide("adadagrad", [cancelled], test=test) == [1, 16]


def test_every_nth_step_is_tested():
    told = [seen(step, step) for step in range(1, 5)]
    assert decide("adadagrad", told, eta=0.7, every=3) == [1, 1, 1, 4, 4]


def test_the_ramp_follows_the_ratio_of_the_averages():
    """tr Σ is 4 and ‖G‖² 0.5 in the first step, 32 and −3 in the second: each of two of 4 rows."""
    first, second = seen(1, 1, micro_square=1.5, norm=1.0), seen(2, 2, micro_square=5.0, norm=1.0)
    one, two = noise_scale(1.5, 1.0, 4, 2), noise_scale(5.0, 1.0, 4, 2)
    assert (one.trace, one.square, two.trace, two.square) == (4.0, 0.5, 32.0, -3.0)
    made = controller("noise_ramp", PLAN, {"decay": 0.9})
    state = made.init()
    for what in (Seen(0, 0, {}), first, second):
        state, _ = made.update(state, what, None)
    np.testing.assert_allclose(state["trace"], 0.9 * 0.1 * 4 + 0.1 * 32)
    np.testing.assert_allclose(state["square"], 0.9 * 0.1 * 0.5 - 0.1 * 3)
    np.testing.assert_allclose(state["weight"], 1 - 0.9**2)


def test_the_ramp_waits_for_its_averages_and_takes_its_share():
    """tr Σ / ‖G‖² = 6 / 0.25 = 24 rows, three batches."""
    told = [seen(step, step, micro_square=1.75) for step in range(1, 13)]
    assert decide("noise_ramp", told, decay=0.9) == [1] * 10 + [4] * 3  # 1 − 0.9^10 > 1 − 1/e
    assert decide("noise_ramp", told, decay=0.9, share=1 / 3) == [1] * 13
    assert decide("noise_ramp", told, decay=0.9, share=2.0, most=5) == [1] * 10 + [5] * 3


def test_the_ramp_shrinks_if_it_may():
    told = [seen(1, 1, micro_square=1.75), seen(2, 2, micro_square=1.0)]
    assert decide("noise_ramp", told, decay=1e-6) == [1, 4, 4]
    assert decide("noise_ramp", told, decay=1e-6, shrinks=True) == [1, 4, 1]


def test_noise_that_hides_the_gradient_takes_the_largest_batch():
    assert decide("noise_ramp", [seen(1, 1, micro_square=3.0)], decay=1e-6) == [1, 16]


@pytest.mark.parametrize("name", ["adadagrad", "noise_ramp"])
@pytest.mark.parametrize(
    ("plan", "options", "says"),
    [
        ({"accumulation": 1}, {}, "--accumulation must be at least 2, got 1"),
        ({}, {"most": 0}, "most must be at least 1, got 0"),
        ({}, {"most": 2.5}, "option most must be int, got 2.5"),
    ],
)
def test_a_run_without_micro_batches_is_refused(name, plan, options, says):
    with pytest.raises(ValueError, match=says):
        controller(name, PLAN._replace(**plan), options)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "adadagrad",
            {"test": "norms"},
            "option test: 'norms' is unknown; did you mean 'norm'",
        ),
        ("adadagrad", {"eta": 0.0}, "eta must be above 0"),
        ("adadagrad", {"every": 0}, "every must be at least 1"),
        ("noise_ramp", {"decay": 1.0}, "decay must be between 0.0 and 1.0"),
        ("noise_ramp", {"share": 0.0}, "share must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(name, options, says):
    with pytest.raises(ValueError, match=says):
        controller(name, PLAN, options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 2, 4, 8]),  # three doublings in the first half of 64 batches
        ({"shape": "ramp", "first": 2, "last": 6, "length": 16}, [2, 4, 5, 6, 6]),
    ],
)
def test_the_schedule_is_that_of_the_batches_used_up(options, expected):
    """Whatever the number of steps; 11, 22 and 32 batches are thirds of 32."""
    told = [Seen(step, used, {}) for step, used in enumerate((0, 10, 12, 23, 40))]
    made = controller("batch_schedule", PLAN, options)
    found = [made.update(made.init(), what, None)[1].batches for what in told]
    assert found == expected


def test_a_shape_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="did you mean 'ramp'"):
        controller("batch_schedule", PLAN, {"shape": "rampe"})


# A linear regression: row i has the gradient (x_i · w − y_i) x_i.
ROWS, DIM = 8, 3
X, Y, W = (np.random.default_rng(0).normal(size=shape) for shape in ((ROWS, DIM), ROWS, DIM))
Y += 10.0  # so that the gradients agree to some degree
GRADIENTS = (X @ W - Y)[:, None] * X + 4.0


def measured(pieces):
    """Measurements of micro-batches of given rows, in float64."""
    each = np.stack([GRADIENTS[list(rows)].mean(0) for rows in pieces])
    mean = each.mean(0)
    return seen(
        *(1, 1, np.mean(np.sum(each**2, 1)), math.sqrt(mean @ mean)),
        dot_square=np.mean((each @ mean) ** 2),
    )


def partitions(rows, size):
    """Every partition into micro-batches of so many rows."""
    if not rows:
        yield []
        return
    first, *rest = rows
    for others in itertools.combinations(rest, size - 1):
        left = [row for row in rest if row not in others]
        for more in partitions(left, size):
            yield [(first, *others), *more]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_variances_of_micro_batches_are_unbiased_over_all_partitions(size):
    """Their means are the variances of single rows, with n − 1, and so are the rows asked for."""
    mean = GRADIENTS.mean(0)
    square, along = mean @ mean, GRADIENTS @ mean
    across = GRADIENTS - np.outer(along, mean) / square
    norm = GRADIENTS.var(0, ddof=1).sum() / (0.3**2 * square)
    inner = along.var(ddof=1) / (0.3**2 * square**2)
    orthogonal = across.var(0, ddof=1).sum() / (0.3**2 * square)
    every = [measured(pieces) for pieces in partitions(list(range(ROWS)), size)]
    assert len(every) == {1: 1, 2: 105, 4: 35}[size]
    shape = size, ROWS // size
    average = lambda test: np.mean([test(what) for what in every])
    np.testing.assert_allclose(average(lambda s: norm_test(s, *shape, 0.3)), norm, rtol=1e-9)
    only_along = lambda s: inner_product_test(s, *shape, 0.3, 1e9)
    np.testing.assert_allclose(average(only_along), inner, rtol=1e-9)
    only_across = lambda s: inner_product_test(s, *shape, 1e9, 0.3)
    np.testing.assert_allclose(average(only_across), orthogonal, rtol=1e-9)


@pytest.mark.parametrize("test", ["norm", "inner_product"])
def test_the_batch_decided_from_a_training_step_is_the_closed_form(test):
    """Micro-batches of one row each: the estimate is the sample variance itself."""
    plan = PLAN._replace(batch_size=ROWS, accumulation=ROWS)
    gradients = (X @ W - Y)[:, None] * X
    mean = gradients.mean(0)
    square, along = mean @ mean, gradients @ mean
    across = gradients - np.outer(along, mean) / square
    rows = {
        "norm": gradients.var(0, ddof=1).sum() / square,
        "inner_product": max(
            along.var(ddof=1) / square**2, across.var(0, ddof=1).sum() / square / 1.5**2
        ),
    }[test]
    loss = lambda w, batch: (
        jnp.sum((batch["x"] @ w - batch["y"]) ** 2) / 2,
        jnp.asarray(len(batch["y"])),
    )
    tx, rate = optax.sgd(0.0), optax.constant_schedule(0.0)
    for factor in (0.99, 1.01):  # of the scale at which the test asks for exactly two batches
        scale = math.sqrt(factor * rows / (2 * ROWS))
        options = {"eta": scale, "theta": scale, "nu": 1.5 * scale, "test": test}
        made = controller("adadagrad", plan, options)
        step = functools.partial(
            train_step,
            **{"loss": loss, "tx": tx, "learning_rate": rate},
            accumulation=ROWS,
            measure=made.measure,
        )
        w, batch = jnp.asarray(W, "f4"), {"x": jnp.asarray(X, "f4"), "y": jnp.asarray(Y, "f4")}
        _, metrics = jax.jit(step)(init_state(w, tx), batch)
        what = Seen(1, 1, {name: value.item() for name, value in metrics.items()})
        _, control = made.update(made.init(), what, None)
        assert control.batches == (4 if factor < 1 else 2)
