"""Stores the state of any optimizer in fewer bits."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array

from memopt.checked import checked
from memopt.errors import check_at_least, check_choice
from memopt.internals import Program, trace
from memopt.matrices import Layout, every_matrix, map_matrices
from memopt.parameters import init_shapes
from memopt.state.codecs import (
    AsIs,
    BFloat16,
    BFloat16AndRemainder,
    Codec,
    Coded,
    Gram,
    Integers,
    named,
)
from memopt.state.owners import SECOND, StateArray, owners
from memopt.state.precision import in_float32
from memopt.state.rounding import rounding_bits
from memopt.trees import (
    map_named,
    named_leaves,
    open_box,
    transpose_tuples,
    untranspose_tuples,
)

CodecChoice: TypeAlias = str | Codec | tuple[str | Codec, str | Codec]
"""A codec, or a pair (that of other arrays, that of second moments)."""

StateChoice: TypeAlias = CodecChoice | Mapping[str, CodecChoice] | None
"""The codecs of `quantize_state`; None for a state that is not quantised."""


class QuantizedState(NamedTuple):
    """State of `quantize_state`.

    Attributes:
        count: steps taken, int32.
        codes: the inner state, with codes in place of the arrays that are quantised.
        scales: the codecs' other arrays, such as scales: for each kind one tree like the inner
            state, with ``MaskedNode`` where a codec has none.
    """

    count: Array  # type: ignore[assignment]
    codes: Any
    scales: tuple[Any, ...]


@checked
def quantize_state(
    inner: optax.GradientTransformation,
    codec: CodecChoice | Mapping[str, CodecChoice] = "int8",
    *,
    rounding: str = "stochastic",
    min_size: int = 4096,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Stores an optimizer's state in 8 bits, 4 bits or bfloat16; updates are computed in float32.

    Between steps, every large array of floats in the state of `inner` is stored as codes of the
    same shape, so that its sharding also fits its codes. Codes are rounded stochastically, by
    bits that depend only on seed, array and step: moments do not freeze, and results do not depend
    on how an array is sharded or stacked. `inner` is computed twice at a step whose scales are not
    known from the previous step: at the first step, while a matrix is all zeros, and after numbers
    exceeded the range of their scale.

    First moments in 4 bits are stored divided by the root of the second moment of the same shape,
    if there is one, so that updates stay bounded, however different the scales of a matrix's
    columns are. A first moment that is computed from the second, as ADOPT's, is divided already.
    Copies of the parameters and sums without decay, as in ``optax.contrib.cocob``, ``madgrad`` or
    ``schedule_free``, are stored as bfloat16 rather than in 8 or 4 bits, because their errors stay;
    the parameters that `memopt.oasis` keeps are not quantised. Averages of G Gᵀ, which SOAP keeps,
    are stored by `memopt.codecs.Gram`, in 8 bits, whichever codec of 8 or 4 bits others have.

    Args:
        inner: any Optax transformation.
        codec: "int8", "int4" (first moments; second moments stay at 8 bits), "flash8"
            (FlashOptim's), "dynamic8" (that of bitsandbytes), "float8", "e5m2" ("int8" of earlier
            releases), "bfloat16", or a codec of `memopt.codecs`. Second moments, recognised by
            their field in Optax's states, use the unsigned codec of a name. A pair is (that of
            other arrays, that of second moments). {pattern: codec or pair} selects by name: the
            first pattern found (`re.search`) in an array's name, such as ``"nu/blocks/up/kernel"``,
            decides, and arrays that match no pattern are not quantised.
        rounding: "stochastic", or "nearest": without randomness, where moments of slow decay may
            freeze. "flash8" and "dynamic8" are then the published codecs, which round small
            second moments to zero.
        min_size: matrices and vectors with fewer numbers are not quantised, nor is a single number.
        seed: the seed of the rounding bits.

    Returns:
        A transformation whose state is a `QuantizedState`.

    Raises:
        ValueError: if the name of a codec or of the rounding is unknown, a tuple is no pair, or
            `min_size` is negative.

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021,
        https://arxiv.org/abs/2110.02861, for the idea; the codecs are different, see
        `memopt.codecs`.

    Example:
        >>> adamw8bit = optax.chain(
        ...     quantize_state(optax.scale_by_adam()),
        ...     optax.add_decayed_weights(0.1),
        ...     optax.scale_by_learning_rate(1e-3),
        ... )
        >>> state = adamw8bit.init({"w": jnp.zeros((64, 256))})
        >>> state[0].codes.mu["w"].dtype, state[0].codes.nu["w"].dtype
        (dtype('int8'), dtype('uint8'))
        >>> rules = {"embed": "bfloat16", "": ("int4", "int8")}  # others: first and second moments
        >>> state = quantize_state(optax.scale_by_adam(), rules).init({"w": jnp.zeros((64, 256))})
        >>> state.codes.mu["w"].dtype, state.codes.nu["w"].dtype
        (dtype(int4), dtype('uint8'))
    """
    check_at_least("min_size", min_size, 0)
    check_choice("rounding", rounding, ("stochastic", "nearest"))
    rules = codec if isinstance(codec, Mapping) else {"": codec}
    choices = [(re.compile(pattern), _pair(codec)) for pattern, codec in rules.items()]
    inner = in_float32(inner)

    # `optax.tree_map_params` needs a number of scales that does not depend on the parameters.
    scales_kept = max(_scale_count(c) for _, pair in choices for c in pair)

    def codec_of(name: str, leaf: Any, place: Place) -> Codec:
        size = math.prod(leaf.shape[place.stack :])
        # One number per matrix would not be smaller as a code and a scale.
        is_small = size < max(min_size, 2) or 0 in leaf.shape
        if is_small or place.array.is_exact or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return AsIs()
        pair = next((pair for pattern, pair in choices if pattern.search(name)), None)
        if pair is None:
            return AsIs()
        codec = pair[place.array.kind == SECOND]
        exact = isinstance(codec, AsIs | BFloat16 | BFloat16AndRemainder)
        if place.array.kept_by == "scale_by_r_std_dev" and not isinstance(codec, AsIs):
            raise ValueError(
                "quantize_state cannot store the moments of optax.scale_by_stddev, which"
                " optax.rmsprop(centered=True) uses: it takes the root of nu - mu², which rounding"
                " makes negative. Use optax.scale_by_rms."
            )
        if exact:
            return codec
        return BFloat16() if place.array.is_sum else Gram() if place.array.is_gram else codec

    def plan(params: Any) -> tuple[Any, Any, Any]:
        """The codec, the shape and dtype, and the `Place` of each array of the inner state."""
        like = init_shapes(inner.init, params)
        places = _places(like, params)
        return map_named(codec_of, like, places), like, places

    def init(params: Any) -> QuantizedState:
        state = inner.init(params)
        coded = map_named(lambda _, x, codec: _first(codec, x), state, plan(params)[0])
        return QuantizedState(jnp.zeros((), jnp.int32), *_columns(coded, state, scales_kept))

    def update(updates: Any, state: QuantizedState, params: Any = None, **extra: Any) -> Any:
        codecs, shapes, places = plan(updates if params is None else params)
        scales = untranspose_tuples(state.scales, state.codes)
        advance = lambda old: inner.update(updates, old, params, **extra)

        def decoded() -> Any:
            def decode(_: str, codes: Array, scales: Any, codec: Codec, like: Any) -> Array:
                return _cast(codec, codec.decode(Coded(codes, scales)), like.dtype)

            return map_named(decode, state.codes, scales, codecs, shapes)

        program = lambda: trace(lambda old: advance(old)[1], decoded())
        divisors = _divisors(codecs, places, program)

        def step() -> tuple[Any, Any]:
            old = decoded()
            seconds = _by_name(old)

            def times_root(name: str, x: Array) -> Array:
                return x * jnp.sqrt(seconds[divisors[name]]) if name in divisors else x

            new_updates, new = advance(map_named(times_root, old))
            cast = lambda _, x, codec: _cast(codec, x, jnp.float32)
            return new_updates, map_named(cast, new, codecs)

        def encode(name: str, x: Array, codec: Codec, place: Place, *like: Any) -> Coded:
            is_vectors = x.ndim == place.stack + 1  # a vector is encoded as a matrix of one row
            apart = lambda a: jnp.expand_dims(a, -2) if is_vectors else a
            together = lambda a: jnp.squeeze(a, -2) if is_vectors else a
            if name in divisors:
                second = seconds[divisors[name]]
                x *= jnp.where(second > 0, jax.lax.rsqrt(second), 0)  # where g² underflows
            x, before = jax.tree.map(apart, (x, Coded(*like)))
            if rounding == "nearest":
                coded = codec.encode_nearest(x, before)
            else:
                coded = codec.encode(x, rounding_bits(x.shape, name, state.count, seed), before)
            return jax.tree.map(together, coded)

        new_updates, new = step()
        seconds = _by_name(new)
        like = state.codes, _fitted(codecs, places, scales, lambda: step()[1])
        coded = map_named(encode, new, codecs, places, *like)
        count = optax.safe_increment(state.count)
        return new_updates, QuantizedState(count, *_columns(coded, new, scales_kept))

    return optax.GradientTransformationExtraArgs(init, update)


def store_state(inner: optax.GradientTransformation, state: StateChoice) -> Any:
    """Returns ``quantize_state(inner, state)``, or `inner` itself for None."""
    return inner if state is None else quantize_state(inner, state)


def _pair(codec: CodecChoice) -> tuple[Codec, Codec]:
    """The codecs of second moments, and before it that of other arrays."""
    pair = codec if isinstance(codec, tuple) else (codec, codec)
    if len(pair) != 2:
        raise ValueError(
            "codec must be a name, a codec, or a pair (that of other arrays, that of second"
            f" moments), got {codec!r}."
        )
    return named(pair[0]).signed, named(pair[1]).unsigned


class Place(NamedTuple):
    """The parameter that a state array belongs to.

    Attributes:
        owner: the parameter's name, or the array's own name if it belongs to none.
        stack: the number of leading axes that are stack axes, as in the parameter.
        array: what `owners` found about the array.
    """

    owner: str
    stack: int
    array: StateArray


def _places(state: Any, params: Any) -> Any:
    """The `Place` of each array; arrays of no parameter have no stack axes."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def note(layout: Layout, p: Any) -> None:
        found.append((layout.name, tuple(p.shape[axis] for axis in layout.stack)))

    map_matrices(note, params, default=every_matrix)

    def place(name: str, x: Any, array: StateArray) -> Place:
        if array.parameter is None:
            return Place(name, 0, array)
        owner, stack = found[array.parameter]
        stacked = len(stack) if x.shape[: len(stack)] == stack else 0
        return Place(owner, stacked, array)

    return map_named(place, state, owners(state, params))


def _by_name(state: Any) -> dict[str, Any]:
    """The arrays of a state by name."""
    return {name: open_box(x) for name, x in named_leaves(state)[0]}


def _divisors(codecs: Any, places: Any, step: Callable[[], Program]) -> dict[str, str]:
    """The second moments whose roots first moments are divided by before they are stored in 4 bits.

    The 4 bits are relative to the largest number of a block, updates are relative to the root.

    Args:
        codecs: the codec of each array.
        places: the `Place` of each array.
        step: returns the inner update, from the old to the new arrays.
    """
    index: dict[str, int] = {}
    pairs: dict[str, str] = {}

    def note(name: str, codec: Codec, place: Place) -> None:
        index[name] = len(index)
        if isinstance(codec, Integers) and codec.bits == 4 and place.array.second_moment:
            pairs[name] = place.array.second_moment

    map_named(note, codecs, places)
    program: Any = step() if pairs else None
    is_divided = lambda name, second: program.needed([index[name]]).reads[index[second]]
    return {name: second for name, second in pairs.items() if not is_divided(name, second)}


def _fitted(codecs: Any, places: Any, scales: Any, new: Callable[[], Any]) -> Any:
    """Returns the scales of the previous step, fitted to `new` where they are unfit.

    If any are unfit, `new` is computed once more, which avoids holding its float arrays at every
    step. It is computed per parameter, as released steps update them.
    """
    structure: Any = jax.tree.structure(codecs)
    columns = (structure.flatten_up_to(tree) for tree in (codecs, places, scales))
    leaves = list(zip(*columns, strict=True))
    unfit = [codec.is_unfit(kept) for codec, _, kept in leaves]
    groups: dict[str, list[int]] = {}
    for i, (_, place, _) in enumerate(leaves):
        if unfit[i] is not False:
            groups.setdefault(place.owner, []).append(i)
    fitted = [kept for _, _, kept in leaves]
    program: Any = trace(new) if groups else None
    for group in groups.values():
        part = program.needed(group)
        mine = [(leaves[i][0], leaves[i][2]) for i in group]
        any_unfit = functools.reduce(jnp.logical_or, [unfit[i] for i in group])
        fit = lambda mine=mine, part=part: [
            codec.fit(kept, x) for (codec, kept), x in zip(mine, part(), strict=True)
        ]
        chosen = jax.lax.cond(any_unfit, fit, lambda mine=mine: [kept for _, kept in mine])
        for i, kept in zip(group, chosen, strict=True):
            fitted[i] = kept
    return structure.unflatten(fitted)


def _cast(codec: Codec, x: Array, dtype: Any) -> Array:
    """Casts arrays that are quantised; others, such as keys and counts, are unchanged."""
    return x if isinstance(codec, AsIs) else x.astype(dtype)


def _first(codec: Codec, x: Any) -> Coded:
    """Encodes an initial array; zeros stay zeros."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return codec.init(x)
    x = _cast(codec, x, jnp.float32)
    if not isinstance(codec, AsIs):
        # Without the barrier, XLA encodes constant zeros at compile time.
        x += jax.lax.optimization_barrier(jnp.float32(0))
    return _encode_nearest(codec, x)


@functools.partial(jax.jit, static_argnums=0)  # traced once for all arrays of a shape
def _encode_nearest(codec: Codec, x: Array) -> Coded:
    return codec.encode_nearest(x)


def _columns(coded: Any, state: Any, scales_kept: int) -> tuple[Any, tuple[Any, ...]]:
    """Splits a tree of `Coded` into codes, boxed as in `state`, and a tuple of scale trees."""
    codes = map_named(lambda _, x, coded: coded.codes, state, coded)
    return codes, transpose_tuples(
        map_named(lambda _, x, coded: coded.side_data, state, coded), state, scales_kept
    )


def _scale_count(codec: Codec) -> int:
    """The number of arrays that a codec keeps in addition to the codes."""
    return len(jax.eval_shape(codec.init, jax.ShapeDtypeStruct((1, 1), jnp.float32)).side_data)
