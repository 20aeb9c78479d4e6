"""Each codec on its own: its errors, and what its rounding adds up to."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memopt import codecs
from memopt.state.codecs import Coded, named
from memopt.state.codecs.row_scaled import RowScaled
from memopt.state.rounding import NEAREST, rounding_bits
from tests.optimizers.kinds import slow_unless
from tests.yardstick import yardstick

# {name: (codec, relative error, error relative to the largest number)}
CODECS = {
    "int8-weights": (named("int8").weights, 0, 0.01),
    "int8-signed": (named("int8").signed, 1, 1e-4),
    "int8-unsigned": (named("int8").unsigned, 1, 1e-9),
    "int4-weights": (named("int4").weights, 0, 0.17),
    "int4-signed": (named("int4").signed, 0, 0.31),
    "float8": (named("float8").weights, 2**-3, 1e-5),
    "e5m2-signed": (named("e5m2").signed, 2**-2, 1e-8),
    "e5m2-unsigned": (named("e5m2").unsigned, 2**-3, 1e-8),
    "float8_e5m2": (codecs.Float8(dtype="float8_e5m2"), 2**-2, 1e-9),
    "flash8-signed": (named("flash8").signed, 0, 0.02),
    "flash8-unsigned": (named("flash8").unsigned, 0, 0.02),
    "dynamic8-signed": (named("dynamic8").signed, 0, 0.03),
    "dynamic8-unsigned": (named("dynamic8").unsigned, 0, 0.015),
    "bfloat16": (named("bfloat16").weights, 2**-7, 0),
    "bfloat16+8": (named("bfloat16+8").weights, 2**-15, 0),
    "integers": (codecs.Integers(block=64), 0, 0.01),
    "integers-fourth-power": (codecs.Integers(power=4, signed=False), 0, 0.02),
    "asymmetric-rows": (codecs.Asymmetric(block=None), 0, 0.01),
}
UNSIGNED = {name for name, (codec, *_) in CODECS.items() if not getattr(codec, "signed", True)}
DYNAMIC = {name for name, (codec, *_) in CODECS.items() if isinstance(codec, RowScaled)}
SCALED = [name for name in CODECS if "bfloat16" not in name]
VARIANTS = {
    *("int4-weights", "float8_e5m2", "integers"),  # of int8-weights and float8
    *("flash8-signed", "dynamic8-unsigned", "integers-fourth-power"),  # of the other sign's
}
HALF = {"flash8-signed", "flash8-unsigned"}  # their scales have the range of float16
FIRST = dict.fromkeys(UNSIGNED & DYNAMIC, 1e-9) | {
    "flash8-unsigned": 255.0**-2,
    "dynamic8-unsigned": 3.3e-7,
    "integers-fourth-power": 3e-10,
}
"""The first code without a sign, relative to the largest number: smaller ones become that."""
every_codec = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow_unless(name not in VARIANTS)) for name in CODECS]
)
scaled_codec = pytest.mark.parametrize("name", SCALED)
jitted = functools.cache(jax.jit)


def numbers(name, shape=(6, 5, 200), seed=0):
    """Numbers of very different sizes."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=shape) * np.exp(draw.normal(size=shape))
    return jnp.asarray(x**2 if name in UNSIGNED else x, jnp.float32)


def coded_and_decoded(name, x, bits=NEAREST, like=None):
    codec = CODECS[name][0]
    if like is not None and codec.is_unfit(like.side_data):
        like = like._replace(side_data=codec.fit(like.side_data, x))
    coded = jitted(codec.encode)(x, bits, like)
    return coded, jitted(codec.decode)(coded)


def around(name, x, like=None):
    """The codes' values next to each number, and their distance."""
    ends = [coded_and_decoded(name, x, np.uint32(b), like)[1] for b in (0, 2**32 - 1)]
    low, high = (np.asarray(f(*ends), float) for f in (jnp.minimum, jnp.maximum))
    return low, high, high - low


def allowed(name, x):
    _, relative, absolute = CODECS[name]
    return relative * np.abs(x) + absolute * np.abs(x).max()


def is_small(name, x):
    """Whether numbers may be below the first code."""
    return np.abs(x) <= FIRST.get(name, 0) * np.abs(x).max()


@every_codec
@pytest.mark.parametrize(
    "shape",
    [(300,), (7, 5461), (6, 5, 200), pytest.param((3, 4, 2, 64), marks=pytest.mark.slow), (5, 1)],
)
def test_codes_keep_the_shape_and_scales_all_but_the_last_axis(name, shape):
    codec, x = CODECS[name][0], numbers(name, shape)
    coded, back = coded_and_decoded(name, x)
    assert coded.codes.shape == shape
    assert back.dtype == jnp.float32
    last = {"Dynamic": 1, "Tapered": 2, "BFloat16AndRemainder": shape[-1]}.get(type(codec).__name__)
    blocks = last or -(-shape[-1] // min(getattr(codec, "block", 0) or shape[-1], shape[-1]))
    assert {s.shape for s in coded.side_data} <= {(*shape[:-1], blocks)}
    assert (np.abs(back - x) <= allowed(name, x)).all()
    again = jax.eval_shape(codec.encode, x, NEAREST, coded)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, coded)
    assert [a.dtype for a in jax.tree.leaves(again)] == [c.dtype for c in jax.tree.leaves(coded)]


@every_codec
def test_errors_are_at_most_the_distance_of_two_codes(name):
    x = numbers(name)
    low, high, gap = around(name, x)
    tiny = np.where(is_small(name, x), FIRST.get(name, 0) * np.abs(x).max(), 1e-6 * np.abs(x))
    assert (low <= x + tiny).all()
    assert (x - tiny <= high).all()
    assert (gap <= allowed(name, x) + tiny).all()
    for step in range(3):
        _, back = coded_and_decoded(name, x, rounding_bits(x.shape, name, step))
        assert ((back == low.astype("float32")) | (back == high.astype("float32"))).all()
    _, nearest = coded_and_decoded(name, x)
    assert (np.abs(nearest - x) <= gap / 2 * 1.01 + tiny).all()


@every_codec
def test_rounding_is_unbiased_over_seeds(name):
    x, count = numbers(name, (3, 200)), 1024
    x = jnp.where(is_small(name, x), x.max(), x)
    codec = CODECS[name][0]
    draw = lambda seed: codec.decode(codec.encode(x, rounding_bits(x.shape, "w", 3, seed)))
    draws = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(count)), float)
    _, _, gap = around(name, x)
    # A number that is one of two has a spread of at most half their distance.
    error = np.abs(draws.mean(0) - x)
    assert (error <= 5 * gap / (2 * np.sqrt(count)) + 1e-6 * np.abs(x)).all()
    # All numbers together say it more sharply.
    z = ((draws.mean(0) - x) / (gap + 1e-30)).mean()
    assert abs(z) <= 4 / (2 * np.sqrt(count * x.size)) + 1e-5


@every_codec
def test_rounding_over_steps_cancels_faster_than_by_chance(name):
    x, count = numbers(name, (3, 200)), 512
    x = jnp.where(is_small(name, x), x.max(), x)
    codec = CODECS[name][0]
    draw = lambda step: codec.decode(codec.encode(x, rounding_bits(x.shape, "w", step)))
    draws = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(count)), float)
    _, _, gap = around(name, x)
    # What chance would do is 5 / (2·sqrt(512)) = 0.11; the golden ratio's discrepancy is below
    # log(count) / count.
    error = np.abs(draws.mean(0) - x)
    assert (error <= gap * np.log(count) / count + 1e-6 * np.abs(x)).all()


def test_bits_depend_on_seed_name_and_step_alone():
    bits = lambda name="w", step=0, seed=0: np.asarray(rounding_bits((64, 64), name, step, seed))
    np.testing.assert_array_equal(
        bits(), jax.jit(rounding_bits, static_argnums=(0, 1))((64, 64), "w", 0)
    )
    others = [bits(seed=1), bits("v"), bits(step=1)]
    assert all((bits() != other).mean() > 0.99 for other in others)
    np.testing.assert_array_equal(bits("blocks/0/up"), bits("blocks/up"))
    np.testing.assert_array_equal(rounding_bits((2, 64, 64), "w", 5), [bits(step=5)] * 2)


def test_bits_are_uniform_and_independent():
    u = np.asarray(rounding_bits((256, 256), "w", 0)) / 2**32
    counts = np.histogram(u, 64, (0, 1))[0]
    assert ((counts - 1024) ** 2 / 1024).sum() < 63 + 5 * np.sqrt(2 * 63)
    for shifted in (
        np.roll(u, 1, 0),
        np.roll(u, 1, 1),
        np.asarray(rounding_bits((256, 256), "v", 0)),
    ):
        assert abs(np.corrcoef(u.ravel(), np.ravel(shifted))[0, 1]) < 5 / 256
    # Rounding errors of a matrix add up in no direction more than independent ones would.
    for e in (u - 0.5, (u < 0.5) - 0.5, (u < 0.1) - 0.1):
        assert np.linalg.norm(e, 2) < 1.1 * 2 * np.sqrt(256) * e.std()


@every_codec
def test_numbers_that_do_not_change_keep_their_codes(name):
    x = numbers(name)
    coded, back = coded_and_decoded(name, x, rounding_bits(x.shape, "w", 0))
    for step in range(1, 4):
        coded2, back2 = coded_and_decoded(name, back, rounding_bits(x.shape, "w", step), coded)
        if isinstance(CODECS[name][0], codecs.Tapered):  # rows whose scale is another are rounded
            kept = (coded2.side_data[0] == coded.side_data[0]).all(-1)
            assert (coded2.codes == coded.codes)[kept].all()
            assert kept.any() or step < 3
        elif name in DYNAMIC:  # the scale may be the next power of two: same numbers, other codes,
            # but for what is so small that it lies a little beside a code of the new scale.
            moved = np.abs(back2 - back) > 1e-8 * np.abs(x).max()
            assert moved.mean() < 1e-3
            assert (np.abs(back2 - back) <= allowed(name, back)).all()
        else:
            np.testing.assert_array_equal(coded2.codes, coded.codes)
            np.testing.assert_array_equal(back2, back)
        coded, back = coded2, back2


@every_codec
def test_zeros_are_zeros_and_wake_up(name):
    codec = CODECS[name][0]
    x = numbers(name, (3, 8, 256)).at[0].set(0).at[1, 3].set(0)
    coded = codec.init(x)
    assert not codec.decode(coded).any()
    coded, back = coded_and_decoded(name, x, rounding_bits(x.shape, "w", 0))
    assert not back[0].any()
    if name in UNSIGNED & DYNAMIC:  # next to nothing, where others in the matrix are not zero
        assert 0 < back[1, 3].max() < 1e-8 * x[1].max()
    else:
        assert not back[1, 3].any()
    awake = numbers(name, x.shape, seed=1)
    coded, back = coded_and_decoded(name, awake, rounding_bits(x.shape, "w", 1), coded)
    assert (np.abs(back - awake) <= allowed(name, awake)).all()


@every_codec
def test_a_spike_is_cut_off_for_one_step_at_most(name):
    x = 1e-3 * numbers(name, (8, 256))  # a spike in float16
    spiked = x.at[2, 100].set(1e6 * jnp.abs(x).max())
    coded, _ = coded_and_decoded(name, x)
    coded, back = coded_and_decoded(name, spiked, NEAREST, coded)
    rest = np.arange(8) != 2
    assert (np.abs(back - x) <= allowed(name, x))[rest].all()
    assert jnp.isfinite(back).all()
    assert back[2, 100] > 4 * jnp.abs(x).max()
    coded, back = coded_and_decoded(name, spiked, NEAREST, coded)
    assert (np.abs(back - spiked) <= allowed(name, spiked)).all()
    coded, back = coded_and_decoded(name, x, NEAREST, coded)
    coded, back = coded_and_decoded(name, x, NEAREST, coded)
    assert (np.abs(back - x) <= allowed(name, x)).all()


@every_codec
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_errors_are_relative_to_the_size_of_the_numbers(name, size):
    if name in HALF:
        size = {1e-30: 1e-6, 1e-20: 1e-5, 1e20: 100.0, 1e30: 1e3}[size]
    x = numbers(name) * np.float32(size)
    _, back = coded_and_decoded(name, x)
    assert (np.abs(back - x) <= allowed(name, x)).all()


@every_codec
@pytest.mark.parametrize("size", [1e-38, 1e-42])
def test_subnormal_numbers_stay_tiny(name, size):
    x = numbers(name) * np.float32(size)
    _, back = coded_and_decoded(name, x)
    least = FIRST[name] * 2.0**-48 if name == "flash8-unsigned" else 1e-37
    assert (np.abs(back) <= 2 * np.abs(x).max() + least).all()


@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("shape", "column"), [((8, 256), 100), ((64, 384), 1)])
def test_nan_and_infinity_stay_and_touch_no_other_row(name, bad, shape, column):
    good = numbers(name, shape)
    x = good.at[2, column].set(bad)
    coded, _ = coded_and_decoded(name, good)
    for step in range(3):
        coded, back = coded_and_decoded(name, x, rounding_bits(x.shape, "w", step), coded)
        assert not jnp.isfinite(back[2, column])
        rest = np.arange(shape[0]) != 2
        assert (np.abs(back - x) <= allowed(name, good))[rest].all()


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16+8"])
def test_nan_stays_nan_and_finite_numbers_stay_finite_in_bfloat16(name):
    codec = CODECS[name][0]
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000], np.uint32).view(np.float32)
    largest = np.finfo(np.float32).max
    x = jnp.asarray([*nans, largest, -largest, np.inf, -np.inf], jnp.float32)
    for bits in (0, NEAREST, 2**32 - 1):
        coded = codec.encode(x, np.uint32(bits))
        for back in (codec.decode(coded), coded.codes.astype(jnp.float32)):
            assert jnp.isnan(back[:4]).all()
            np.testing.assert_allclose(back[4:], x[4:], rtol=2**-7)


@pytest.mark.parametrize("name", ["int4-signed", "int4-weights", "integers", "asymmetric-rows"])
def test_the_largest_finite_numbers_are_not_nan(name):
    x = jnp.full((8, 256), 3.3e38).at[:, ::2].multiply(-1 if name not in UNSIGNED else 1)
    coded, _ = coded_and_decoded(name, x)
    for step in range(2):
        coded, back = coded_and_decoded(name, x, rounding_bits(x.shape, "w", step), coded)
        assert (jnp.abs(back) > 1e37).all()


@pytest.mark.parametrize("name", sorted(UNSIGNED))
def test_second_moments_are_never_zero(name):
    x = numbers(name, (8, 256)).at[:, ::2].multiply(1e-20).at[3].multiply(1e-20)
    coded, _ = coded_and_decoded(name, x)
    for step in range(4):
        coded, back = coded_and_decoded(name, x, rounding_bits(x.shape, "w", step), coded)
        assert (back > 0).all()


@pytest.mark.parametrize("name", sorted(DYNAMIC))
def test_a_row_may_grow_by_the_headroom_at_each_step(name):
    x = numbers(name, (8, 256))
    coded, _ = coded_and_decoded(name, x)
    for step in range(1, 20):
        x = (2 ** CODECS[name][0].headroom - 1) * x
        coded, back = coded_and_decoded(name, x, rounding_bits(x.shape, "w", step), coded)
        assert (np.abs(back - x) <= allowed(name, x)).all()


TABLES = Path(yardstick.HERE, "tables")


@pytest.mark.parametrize("kind", ["momentum", "variance"])
def test_nearest_codes_and_scales_of_flash8_are_flashoptims(kind):
    with np.load(TABLES / "flashoptim_codec.npz") as table:
        x, codes, scales, decoded = (
            table[f"{part}/{kind}"] for part in ("in", "codes", "scales", "decoded")
        )
    codec = codecs.Companded(signed=kind == "momentum")
    coded = jitted(codec.encode_nearest)(x)
    back = jitted(codec.decode)(coded)
    groups = [x[i : i + 32] for i in range(0, len(x), 32)]
    largest = np.array([np.abs(g).max() for g in groups])
    lost = (scales == 0) & (largest > 0)
    assert lost.sum() == 1
    np.testing.assert_array_equal(coded.side_data[0][~lost], scales[~lost])
    known = ~np.repeat(lost, 32)[: len(x)]
    np.testing.assert_array_equal(coded.codes[known], codes[known])
    np.testing.assert_allclose(back[known], decoded[known], rtol=3e-7)
    # Where they lose a group, here its numbers are at most half a code of the smallest scale off.
    assert not decoded[~known].any()
    root = np.sqrt if kind == "variance" else np.asarray
    assert (np.abs(root(back) - root(x))[~known] <= 2.0**-24 / 254).all()


@pytest.mark.parametrize("kind", ["momentum", "variance"])
def test_numbers_beyond_the_range_of_flash8_are_clipped(kind):
    codec = codecs.Companded(signed=kind == "momentum")
    x = jnp.asarray(np.linspace(1, 32, 32, dtype=np.float32)) * (1e9 if codec.signed else 1e18)
    most = 65504.0 ** (2 - codec.signed)
    like = None
    for coded in (codec.encode_nearest(x), codec.encode(x, NEAREST, like)):
        np.testing.assert_allclose(codec.decode(coded), most, rtol=1e-6)


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_nearest_codes_of_dynamic8_are_those_of_bitsandbytes(kind):
    with np.load(TABLES / "bnb_dynamic_map.npz") as table:
        numbers, x, codes, absmax, decoded = (
            table[f"{part}/{kind}"] for part in ("map", "in", "codes", "absmax", "decoded")
        )
    codec = codecs.DynamicTree(signed=kind == "signed")
    ours = np.arange(256, dtype=np.uint8)
    ours = (ours - np.uint8(127)).view(np.int8) if codec.signed else ours
    found = codec.decode(Coded(jnp.asarray(ours), (jnp.ones(1),)))
    np.testing.assert_allclose(found, numbers, rtol=2e-7)
    coded = jitted(codec.encode_nearest)(x)
    np.testing.assert_array_equal(coded.side_data[0], absmax)
    theirs = np.asarray(coded.codes).view(np.uint8) + np.uint8(127 * codec.signed)
    middle = np.arange(len(x)) // 256 == 3  # halfway between two, which rounding decides
    np.testing.assert_array_equal(theirs[~middle], codes[~middle])
    assert (np.abs(theirs.astype(int) - codes)[middle] <= 1).all()
    size = np.repeat(absmax, 256)[: len(x)]
    off = np.abs(codec.decode(coded) - decoded)
    assert (off <= 1e-7 * size)[~middle].all()


@pytest.mark.parametrize("name", ["int8-signed", "int8-unsigned"])
def test_most_codes_are_where_most_numbers_are(name):
    """Half of them in the upper octaves, a quarter in as many below, and so on."""
    codec = CODECS[name][0]
    octave = np.arange(0.9, 1 - 4 * codec.octaves, -0.01, np.float32)
    x = jnp.asarray(np.stack([np.exp2(octave)] * 4))
    coded, _ = coded_and_decoded(name, x)
    _, back = coded_and_decoded(name, x, rounding_bits(x.shape, "w", 1), coded)
    off, part = np.abs(back / x - 1), (1 - octave) // codec.octaves
    off = np.array([off[:, part == i].max() for i in range(4)])
    per_octave = 2.0 ** (7 - codec.signed) / codec.octaves / 2.0 ** np.arange(4)
    assert (off <= 1 / per_octave).all()
    assert (off > 0.7 / per_octave).all()


DEFAULTS = {(True, 4), (False, 8)}  # of "int8", for first and for second moments


@pytest.mark.parametrize(
    ("signed", "octaves"),
    [
        pytest.param(signed, octaves, marks=slow_unless((signed, octaves) in DEFAULTS))
        for signed in (True, False)
        for octaves in (4, 8, 16)
    ],
)
def test_codes_of_tapered_are_in_order_and_their_own_numbers_have_them(signed, octaves):
    for headroom in range(7):
        codec = codecs.Tapered(signed, octaves, headroom)
        encode, decode = jax.jit(codec.encode), jax.jit(codec.decode)
        codes = np.arange(0 if signed else 1, codec._last)
        like = codecs.Coded(codes.astype("uint8" if codes[-1] > 127 else "int8"), (jnp.ones(2),))
        x = decode(like)
        assert (np.diff(x) > 0).all()
        like = codecs.Coded(like.codes, codec._join(jnp.ones(1), jnp.full(1, 2.0**-headroom)))
        for bits in (0, NEAREST):
            np.testing.assert_array_equal(encode(x, np.uint32(bits), like).codes, codes)
        for bad in (jnp.nan, jnp.inf):
            assert not jnp.isfinite(decode(encode(x.at[3].set(bad), NEAREST, like))[3])


@pytest.mark.parametrize("name", ["int4-weights", "int4-signed"])
def test_four_bits_count_as_half_a_byte(name):
    coded, _ = coded_and_decoded(name, numbers(name))
    assert codecs.bits_of(coded.codes.dtype) == 4


def test_the_upper_half_of_bfloat16_and_remainder_is_the_nearest():
    x = numbers("bfloat16+8")
    coded, _ = coded_and_decoded("bfloat16+8", x)
    assert (coded.codes == x.astype(jnp.bfloat16)).mean() > 0.99  # ties of the lower half apart
    assert coded.side_data[0].dtype == jnp.int8


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: named("int7"), "codec 'int7' is unknown; did you mean 'int8'? Allowed: int8, in"),
        (lambda: codecs.Integers(bits=5), "bits 5 is unknown. Allowed: 4, 8."),
        (lambda: codecs.Integers(power=3), "power 3 is unknown. Allowed: 1, 2, 4."),
        (lambda: codecs.Asymmetric(bits=2), "bits 2 is unknown. Allowed: 4, 8."),
        (lambda: codecs.Asymmetric(block=0), "block must be at least 1, got 0."),
        (lambda: codecs.Float8(dtype="float8"), "dtype 'float8' is unknown; did you mean"),
        (lambda: codecs.Dynamic(exponent_bits=7), "exponent_bits 7 is unknown. Allowed: 2, 3, "),
        (lambda: codecs.Dynamic(5, 3), "mantissa_bits 3 is unknown. Allowed: 0, 1, 2."),
        (lambda: codecs.Dynamic(headroom=-1), "headroom -1 is unknown; did you mean"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


def test_a_codec_stands_for_itself():
    codec = codecs.Integers()
    assert set(named(codec)) == {codec}
    assert codec.decode(Coded(jnp.array([127], jnp.int8), (jnp.ones(1),)))[0] == 1


@pytest.mark.parametrize("block", [128, 256])
def test_blocks_along_a_tpus_tiles_are_those_of_the_last_axis(block, monkeypatch):
    """A number that is not finite spoils its own block alone."""
    codec = codecs.Integers(block=block)
    x = np.random.default_rng(0).normal(size=(2, 16, 512)).astype(np.float32)
    x[1, 3, 40] = np.inf
    expected = codec.encode_nearest(jnp.asarray(x))
    on_tpu = lambda *xs, tpu, default: tpu(*xs)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_tpu)
    found = codec.encode_nearest(jnp.asarray(x))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (~jnp.isfinite(codec.decode(found))).sum() == block
