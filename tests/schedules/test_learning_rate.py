"""Schedules of the learning rate against the papers' formulas, written again in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memopt import schedules

STEPS, WARMUP, PEAK, END = 1000, 100, 0.02, 0.002

#: Each takes t, the steps after the warm-up, and T, how many there are; `schedule`'s default
#: options are written out.
FORMULAS = {
    "constant": lambda t, T, end: PEAK,
    "linear": lambda t, T, end: PEAK + (end - PEAK) * t / T,
    "cosine": lambda t, T, end: end + (PEAK - end) * (1 + np.cos(np.pi * t / T)) / 2,
    "wsd": lambda t, T, end: PEAK + (end - PEAK) * max(0, t - (T - 200)) / 200,
    "wsd_exponential": lambda t, T, end: (
        # MiniCPM: 0.5^((s − S) / T) with the half-life at which the last step has the end
        PEAK * 0.5 ** (max(0, t - (T - 200)) / (200 * np.log(2) / np.log(PEAK / end)))
    ),
    "wsd_sqrt": lambda t, T, end: end + (PEAK - end) * (1 - np.sqrt(max(0, t - (T - 200)) / 200)),
    "rex": lambda t, T, end: end + (PEAK - end) * (1 - t / T) / (1 - t / T / 2),
    "one_cycle": lambda t, T, end: (
        _half_cosine(PEAK / 25, PEAK, t / int(0.3 * T))
        if t < int(0.3 * T)
        else _half_cosine(PEAK, end, (t - int(0.3 * T)) / (T - int(0.3 * T)))
    ),
    "inverse_sqrt": lambda t, T, end: PEAK * np.sqrt(max(STEPS - T, 1) / (t + max(STEPS - T, 1))),
    "power": lambda t, T, end: _power(t, T),
    "rewarm": lambda t, T, end: _rewarm(t, T, end),
    "restarts": lambda t, T, end: (
        end if t == T else _half_cosine(PEAK, end, (t % (T / 4)) / (T / 4))
    ),
}


def _half_cosine(start, end, z):
    return end + (start - end) * (1 + np.cos(np.pi * z)) / 2


def _power(t, T):
    """η_max 0.02, 4.2 million tokens a step in 1024 sequences of 4096."""
    law = lambda n: min(0.02, 1024 * 4 * n**-0.51) if n else 0.02
    tokens = lambda t: (STEPS - T + t) * 4096 * 1024
    if t < T - 200:
        return law(tokens(t))
    z = (t - (T - 200)) / 200
    return law(tokens(T - 200)) * (np.e ** (1 - z) - 1) / (np.e - 1)


def _rewarm(t, T, end):
    old, rise = T - T // 2, 0.01 * (T // 2)
    if t < old:
        return _half_cosine(PEAK, end, t / old)
    if t < old + rise:
        return end + (PEAK - end) * (t - old) / rise
    return _half_cosine(PEAK, end, (t - old - rise) / (T // 2 - rise))


def in_float64(name, t, warmup, end):
    formula = FORMULAS[name]
    if t < warmup:
        return formula(0, STEPS - warmup, end) * t / warmup
    return formula(min(t, STEPS) - warmup, STEPS - warmup, end)


COUNTS = np.unique([*range(0, 1100, 7), 99, 100, 101, 549, 550, 551, 800, 801, 999, 1000, 10**6])


def test_every_shape_has_a_formula_here():
    assert set(FORMULAS) == set(schedules.names())


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("name", schedules.names())
def test_each_shape_follows_its_formula(name, warmup):
    rate = schedules.schedule(name, PEAK, STEPS, warmup_steps=warmup, end_value=END)
    expected = [in_float64(name, int(t), warmup, END) for t in COUNTS]
    found = np.broadcast_to(jax.jit(jax.vmap(rate))(COUNTS), COUNTS.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("name", schedules.names())
def test_one_number_an_array_and_a_compiled_number_give_the_same(name):
    rate = schedules.schedule(name, PEAK, STEPS, warmup_steps=WARMUP)
    compiled = jax.jit(rate)
    for t in (0, 1, 99, 100, 101, 450, 550, 800, 900, 999, 1000, 2000):
        one = float(rate(t))
        many = np.broadcast_to(rate(jnp.array([t, t])), (2,))
        others = [*many, compiled(jnp.int32(t)), rate(jnp.float32(t)), rate(np.int64(t))]
        np.testing.assert_allclose(np.array(others, np.float32), one, rtol=3e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*has no effect on any step")
@pytest.mark.parametrize("warmup", [0, 1, 50, 99])
@pytest.mark.parametrize("name", schedules.names())
def test_each_shape_warms_up_and_keeps_its_last_value(name, warmup):
    """Down to a single step after the warm-up."""
    rate = schedules.schedule(name, 2.0, 100, warmup_steps=warmup, end_value=0.2, init_value=0.01)
    values = np.broadcast_to(jax.jit(jax.vmap(rate))(np.arange(150)), (150,))
    assert np.isfinite(values).all()
    top = values[warmup]
    np.testing.assert_allclose(
        values[:warmup], np.linspace(0.01, top, warmup + 1)[:warmup], rtol=1e-5
    )
    if schedules.SHAPES[name].starts_at_peak:
        np.testing.assert_allclose(top, 2.0, rtol=1e-6)
    assert values.max() <= 2.0 * (1 + 1e-6)
    if schedules.SHAPES[name].end is not None:
        np.testing.assert_allclose(values[100], 0.2, rtol=1e-5)
    np.testing.assert_array_equal(values[100:], values[100])


@pytest.mark.parametrize("name", schedules.names())
def test_the_slope_is_that_of_the_curve_and_never_nan(name):
    rate = schedules.schedule(name, 1.0, STEPS, warmup_steps=WARMUP, end_value=0.1)
    slope = jax.jit(jax.grad(lambda t: jnp.asarray(rate(t), jnp.float32)))
    for t in (50.0, 300.0, 460.0, 640.0, 900.0):
        difference = (float(rate(t + 4.0)) - float(rate(t - 4.0))) / 8
        np.testing.assert_allclose(slope(t), difference, rtol=0.02, atol=2e-6)
    at_once = schedules.schedule(name, 1.0, STEPS, end_value=0.1)
    for curve in (rate, at_once):
        slopes = jax.vmap(jax.grad(lambda t, curve=curve: jnp.asarray(curve(t), jnp.float32)))
        edges = jnp.array([0.0, 100.0, 500.0, 550.0, 800.0, 1000.0, 5000.0])
        assert np.isfinite(jax.jit(slopes)(edges)).all()


@pytest.mark.filterwarnings("ignore:.*has no effect on any step")
@pytest.mark.parametrize("name", schedules.names())
def test_counts_beyond_what_floats_hold_are_told_apart_around_each_boundary(name):
    """A warm-up of 100 steps more than 2^25 after a start: int32 is exact, float32 is not."""
    begin = 2**25 + 1
    options = {"decay_steps": 10} if "decay_steps" in schedules.SHAPES[name].defaults else {}
    rate = schedules.schedule(name, 1.0, begin + 10, warmup_steps=begin, end_value=0.1, **options)
    near = np.array([float(rate(jnp.int32(begin + t))) for t in range(11)])
    short = schedules.schedule(name, 1.0, 10, end_value=0.1, **options)
    if name not in ("power", "inverse_sqrt"):  # which depend on the length of the warm-up
        np.testing.assert_allclose(near, [float(short(t)) for t in range(11)], rtol=1e-6)
    assert float(rate(begin // 2)) == pytest.approx(near[0] / 2, rel=1e-6)


def test_rex_is_the_formula_of_pytorch_optimizer():
    """From its documentation: max · (1 − z) / (1 − z / 2) with z = step / total."""
    rate = schedules.schedule("rex", 0.3, 50)
    z = np.arange(51) / 50
    found = [float(rate(t)) for t in range(51)]
    np.testing.assert_allclose(found, 0.3 * ((1 - z) / (1 - z / 2)), rtol=1e-5, atol=1e-9)


def test_one_cycle_is_optaxs_where_that_has_the_same_options():
    mine = schedules.schedule("one_cycle", 0.5, 200)
    theirs = optax.cosine_onecycle_schedule(200, 0.5)
    of_all = lambda rate: jax.jit(jax.vmap(rate))(np.arange(250))
    np.testing.assert_allclose(of_all(mine), of_all(theirs), rtol=2e-5, atol=1e-7)


def test_inverse_sqrt_is_that_of_the_transformer():
    """d^−½ min(s^−½, s w^−1.5), scaled to its highest value."""
    rate = schedules.schedule("inverse_sqrt", 1.0, 5000, warmup_steps=400)
    for step in (1, 100, 400, 401, 1600, 5000):
        expected = min(step**-0.5, step * 400**-1.5) * 400**0.5
        np.testing.assert_allclose(rate(step), expected, rtol=1e-5)
    longer = schedules.schedule("inverse_sqrt", 1.0, 5000, timescale=900)
    np.testing.assert_allclose(longer(2700), 0.5, rtol=1e-6)


def test_power_gives_the_papers_rate_after_ten_trillion_tokens():
    """The rate that the paper prints for a batch of 1024 is 0.0011; here with its a = 4."""
    tokens = 10**13
    rate = schedules.schedule("power", 0.02, 2 * tokens // 2**22, decay_steps=2)
    np.testing.assert_allclose(rate(tokens // 2**22), 1024 * 4 * tokens**-0.51, rtol=1e-5)
    start = schedules.schedule("power", 0.02, 10**4, tokens_seen=tokens, decay_steps=2)
    np.testing.assert_allclose(start(0), rate(tokens // 2**22), rtol=1e-5)


def test_power_is_capped_for_the_first_26_billion_tokens():
    """RULES: at a batch of 1024 sequences."""
    rate = schedules.schedule("power", 0.02, 10**4)
    binds = [float(rate(t)) == np.float32(0.02) for t in (0, int(25e9 / 2**22), int(27e9 / 2**22))]
    assert binds == [True, True, False]


def test_power_follows_the_options_that_a_run_fills_in():
    options = {"tokens_per_step": 2**16, "batch_sequences": 32, "a": 3.0, "b": -0.4}
    rate = schedules.schedule("power", 0.5, 1000, tokens_seen=5e6, warmup_steps=10, **options)
    np.testing.assert_allclose(rate(300), 32 * 3 * (5e6 + 300 * 2**16) ** -0.4, rtol=1e-5)
    np.testing.assert_allclose(rate(5), 32 * 3 * (5e6 + 10 * 2**16) ** -0.4 / 2, rtol=1e-5)
    assert float(rate(1000)) == 0
    by_batch = schedules.schedule("power", 0.5, 1000, tokens_per_step=2**16)
    np.testing.assert_allclose(by_batch(500), 16 * 4 * (500 * 2**16) ** -0.51, rtol=1e-5)


def test_restarts_have_cycles_that_grow_and_peaks_that_fall():
    options = {"cycles": 3, "length_factor": 2.0, "peak_factor": 0.5}
    rate = schedules.schedule("restarts", 0.8, 710, warmup_steps=10, end_value=0.1, **options)
    starts = [float(rate(10 + t)) for t in (0, 100, 300)]
    np.testing.assert_allclose(starts, [0.8, 0.4, 0.2], rtol=1e-6)
    ends = [float(rate(10 + t)) for t in (99.999, 299.999, 700)]
    np.testing.assert_allclose(ends, [0.1, 0.1, 0.1], rtol=1e-4)
    np.testing.assert_allclose(rate(10 + 500), 0.15, rtol=1e-5)


def test_rewarm_begins_its_new_data_where_it_says():
    rate = schedules.schedule("rewarm", 1.0, 1000, new_steps=400, rewarm=0.1)
    np.testing.assert_allclose(
        [float(rate(t)) for t in (0, 300, 600, 620, 640, 820, 1000)],
        [1.0, 0.55, 0.1, 0.55, 1.0, 0.55, 0.1],
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", schedules.names())
def test_a_schedule_of_tokens_is_one_of_steps(name):
    """int32 holds a 512th part of 2^40 tokens."""
    options = {"decay_steps": 2**37} if "decay_steps" in schedules.SHAPES[name].defaults else {}
    if name == "power":
        options |= {"tokens_per_step": 1, "batch_sequences": 1024}
    tokens = schedules.schedule(name, 0.02, 2**40, warmup_steps=2**35, end_value=0.002, **options)
    rate = jax.jit(schedules.in_steps(tokens, 2**22))
    options = {"decay_steps": 2**15} if "decay_steps" in options else {}
    steps = schedules.schedule(name, 0.02, 2**18, warmup_steps=2**13, end_value=0.002, **options)
    counts = [0, 1, 4096, 2**13, 100_000, 200_001, 2**18 - 2**15, 2**18 - 1, 2**18, 2**20]
    for count in counts:
        np.testing.assert_allclose(rate(jnp.int32(count)), steps(count), rtol=1e-5, atol=1e-9)
        exact = float(tokens(count * 2**22))
        np.testing.assert_allclose(rate(count), exact, rtol=1e-5, atol=1e-9)


def test_counts_that_jax_would_wrap_around_are_not():
    rate = schedules.schedule("linear", 1.0, 2**34)
    for count in (2**33, np.int64(2**33), np.array([2**33]), np.array([2**33 + 1], np.uint64)):
        np.testing.assert_allclose(rate(count), 0.5, rtol=1e-6)


def test_a_shape_of_ones_own_is_checked_and_follows_its_options(monkeypatch):
    def step(span, *, at=0.5, word="x"):
        return lambda count: jnp.where(count < at * span.rest, span.peak, span.end)

    monkeypatch.setattr(schedules.shapes, "SHAPES", schedules.SHAPES)
    schedules.register("step", schedules.Shape(step, "to see"))
    try:
        rate = schedules.schedule("step", 1.0, 100, at=0.25, word="y")
        assert [float(rate(t)) for t in (24, 25, 1000)] == [1.0, 0.0, 0.0]
        assert "step" in schedules.names()
        with pytest.raises(ValueError, match="option of step: 'att' is unknown; did you mean 'at'"):
            schedules.schedule("step", 1.0, 100, att=1)
        for taken in ("step", "wsd", "ramp"):
            with pytest.raises(ValueError, match=f"'{taken}' is that of a schedule already"):
                schedules.register(taken, schedules.Shape(step, "again"))
    finally:
        del schedules.SHAPES["step"]


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("my own", schedules.Shape(schedules.shapes.linear, "x"), "must be a word of letters"),
        ("", schedules.Shape(schedules.shapes.linear, "x"), "must be a word of letters"),
        ("own", schedules.shapes.linear, r"as Shape\(linear, .*got function"),
        ("own", schedules.Shape("linear", "x"), "must be a function, got 'linear'"),
        ("own", schedules.Shape(lambda: None, "x"), "must take a Span first"),
        ("own", schedules.Shape(lambda span, stairs=4: None, "x"), r"by keyword only.*stairs=4"),
        ("own", schedules.Shape(lambda span, *, stairs: None, "x"), "each with a default"),
        ("own", schedules.Shape(lambda span: 0.1, "x"), "'float' object is not callable"),
        ("own", schedules.Shape(lambda span: lambda count: "x", "x"), "to a finite number"),
        ("own", schedules.Shape(lambda span: lambda count: jnp.nan * count, "x"), "got array.nan"),
        ("own", schedules.Shape(lambda span: lambda: 1.0, "x"), "fails for 1000 steps: "),
    ],
)
def test_what_makes_no_schedules_is_not_registered(name, shape, says):
    with pytest.raises(ValueError, match=says):
        schedules.register(name, shape)
    assert name not in schedules.SHAPES


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        (
            ("wsd", 1.0, 10),
            {"warmup_steps": 9},
            "decay_steps=1 at the end of steps=10 has no effect",
        ),
        (("power", 1.0, 9), {}, "decay_steps=1 at the end of steps=9"),
        (("cosine", 1.0, 10), {"warmup_steps": 9}, "a fall after warmup_steps=9 of steps=10"),
        (("one_cycle", 1.0, 3), {}, "the rise in pct_start=0.3 of 3 steps"),
        (("rewarm", 1.0, 10), {}, "the rise in rewarm=0.01 of new_steps=5"),
        (("restarts", 1.0, 3), {}, "1 of cycles=4 in 3 steps"),
    ],
)
def test_a_part_that_no_step_is_trained_with_is_said(given, options, says):
    with pytest.warns(UserWarning, match=says):
        schedules.schedule(*given, **options)


def test_a_schedule_never_falls_below_zero(monkeypatch):
    """An end of 0 does, by 1.5e-8, where XLA fuses arithmetic, which it does not in tests."""
    below = schedules.Shape(lambda span: lambda count: 0.5 - count / 10, "to see")
    monkeypatch.setitem(schedules.SHAPES, "below", below)
    rate = schedules.schedule("below", 1.0, 10)
    found = [float(rate(t)) for t in (0, 4, 6, 10, 20)]
    np.testing.assert_allclose(found, [0.5, 0.1, 0, 0, 0], atol=1e-7)
    assert min(found) == 0
    slope = jax.grad(schedules.schedule("linear", 1.0, 100))
    np.testing.assert_allclose(slope(99.0), -0.01, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        (("cosin", 1.0, 100), {}, "did you mean 'cosine'"),
        (("linear", 1.0, 100), {"warmup_steps": 100}, "must leave room in steps=100"),
        (("constant", 1.0, 0), {}, "steps must be at least 1"),
        (("linear", 1.0, 10), {"warmup_steps": -1}, "warmup_steps must be at least 0"),
        (("cosine", 1.0, 100), {"decay_steps": 9}, "'cosine' has no options, got decay_steps=9"),
        (
            ("wsd", 1.0, 100),
            {"decay": 9},
            "option of wsd: 'decay' is unknown; did you mean 'decay_",
        ),
        (("wsd", 1.0, 100), {"decay_steps": 101}, "decay_steps=101 must leave room in steps=100"),
        (("wsd", 1.0, 100), {"decay_steps": 0}, "decay_steps must be at least 1, got 0"),
        (("wsd", 1.0, 100), {"decay_steps": 20.5}, "wsd must be a whole number, got 20.5"),
        (("wsd", 1.0, 100), {"decay_steps": True}, "wsd must be a number, got True"),
        (("wsd", 1.0, 100), {"decay_steps": "9x"}, "decay_steps of wsd must be a number, got '9x'"),
        (("wsd_exponential", 1.0, 100), {"end_value": 0}, "end_value of wsd_.* must be above 0"),
        (("one_cycle", 1.0, 100), {"pct_start": 1}, "pct_start must be between 0 and 1, got 1"),
        (("inverse_sqrt", 1.0, 100), {"timescale": 0}, "timescale must be above 0"),
        (("power", 1.0, 100), {"tokens_per_step": 0}, "tokens_per_step must be above 0"),
        (("power", 1.0, 100), {"tokens_seen": -1}, "tokens_seen must be at least 0"),
        (("rewarm", 1.0, 100), {"new_steps": 100}, "new_steps=100 must leave room in steps=100"),
        (("rewarm", 1.0, 100), {"rewarm": 1}, "rewarm must be at least 0 and below 1"),
        (
            ("restarts", 1.0, 100),
            {"cycles": 1.5},
            "cycles of restarts must be a whole number, got 1.5",
        ),
        (("restarts", 1.0, 100), {"length_factor": 0}, "length_factor must be above 0"),
        (("restarts", 1.0, 100), {"length_factor": 1e200}, "length_factor=1e\\+200 is too large"),
        (("restarts", 1.0, 100), {"cycles": 0}, "cycles must be at least 1, got 0"),
        (("power", 1.0, 100), {"b": float("nan")}, "option b of power must be finite, got nan"),
        (("cosine", float("inf"), 100), {}, "peak must be finite, got inf"),
        (("cosine", -1.0, 100), {}, "peak must be at least 0, got -1.0"),
        (("cosine", 1.0, 100), {"end_value": -0.1}, "end_value must be at least 0, got -0.1"),
    ],
)
def test_what_makes_no_schedule_is_refused(given, options, says):
    with pytest.raises(ValueError, match=says):
        schedules.schedule(*given, **options)


def test_old_names_still_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="available is now memopt.schedules.names"):
        assert schedules.available() == schedules.names()
    with pytest.warns(DeprecationWarning, match="peak_value=…"):
        assert float(schedules.schedule("linear", peak_value=2.0, steps=10)(5)) == 1.0
