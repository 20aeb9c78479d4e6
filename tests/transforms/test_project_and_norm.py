"""The one-pass projection: its kernel interpreted here, and compiled for TPUs by libtpu."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding

from benchmarks import traffic
from memopt.axis_types import on_auto_axes, spec_of
from memopt.matrices import Matrix, layout_of
from memopt.planning.chips import devices
from memopt.transforms.project_and_norm import _kernel, _on_shards, project_and_norm
from memopt.transforms.subspace import matrix_spec

RANK = 4


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def problem(shape, left, dtype=jnp.float32, rank=RANK):
    side = shape[-2 if left else -1]
    basis = jax.random.normal(jax.random.key(0), (side, rank)) / np.sqrt(rank)
    return basis, jax.random.normal(jax.random.key(1), shape).astype(dtype)


def expected(basis, gradient, left):
    p, g = (np.asarray(x, np.float64) for x in (basis, gradient))
    low = np.einsum("mr,...mn->...rn", p, g) if left else np.einsum("...mn,nr->...mr", g, p)
    return low, np.square(g).sum(-2 if left else -1, keepdims=True)


def assert_close(results, wanted):
    for got, want in zip(results, wanted, strict=True):
        assert got.dtype == jnp.float32
        assert got.shape == want.shape
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-5 * want.max())


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "shape",
    [
        (64, 640),  # whole tiles
        (2, 3, 64, 128),  # two stack axes
        (2, 700, 1100),  # blocks end beyond the array
        (5461, 40),  # the LLaMA 1b's odd side, which is projected in blocks
        (8, 128, 5461),  # rows and columns change places
        (8, 5461, 128),  # the stack among the rows
    ],
)
def test_kernel_is_the_product_and_the_sums(shape, dtype, left, interpreted):
    basis, gradient = problem(shape, left, dtype)
    results = jax.jit(functools.partial(_kernel, left=left))(basis, gradient)
    assert_close(results, expected(basis, gradient, left))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    "spec", [("a",), (None, "a"), (None, None, "a"), (None, "a", "b"), ("b", None, "a")]
)
def test_kernel_on_shards(spec, left, interpreted):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    basis, gradient = problem((4, 64, 256), left)
    split = jax.P(*spec, *(None,) * (3 - len(spec)))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(gradient, NamedSharding(mesh, split))
        one_pass = functools.partial(_on_shards, left=left, split=split)
        compiled = jax.jit(one_pass).lower(basis, sharded).compile()
        assert_close(compiled(basis, sharded), expected(basis, gradient, left))
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("left", [True, False])
def test_elsewhere_it_is_the_plain_expressions(left, kind):
    basis, gradient = problem((4, 64, 256), left)
    assert_close(project_and_norm(basis, gradient, left), expected(basis, gradient, left))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        gradient = jax.device_put(gradient, NamedSharding(mesh, jax.P(None, "a", "b")))
        results = jax.jit(project, static_argnums=2)(basis, gradient, left)
    assert_close(results, expected(basis, gradient, left))


def test_wide_gradients_stay_wide():
    with jax.enable_x64(True):
        low, squares = project_and_norm(jnp.eye(64, 4, dtype=float), jnp.ones((64, 8)), True)
        assert low.dtype == squares.dtype == jnp.float64


def test_it_is_a_transformable_function():
    basis, gradient = problem((3, 64, 40), True)
    one_by_one = jax.vmap(lambda g: project_and_norm(basis, g, True))(gradient)
    assert_close(one_by_one, expected(basis, gradient, True))
    loss = lambda p, g: sum(jnp.sin(x).sum() for x in project_and_norm(p, g, True))
    low, squares = project_and_norm(basis, gradient, True)
    by_hand = basis @ jnp.cos(low) + 2 * gradient * jnp.cos(squares)
    slope = jax.grad(loss, argnums=1)(basis, gradient)
    np.testing.assert_allclose(slope, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", [True, False])
def test_products_are_in_full_precision(left):  # which only a TPU would tell
    assert "HIGHEST" in str(
        jax.make_jaxpr(functools.partial(_kernel, left=left))(*problem((64, 128), left))
    )


def test_kernel_under_vmap(interpreted):
    basis, gradient = problem((3, 64, 40), True)
    results = jax.vmap(lambda g: _kernel(basis, g, left=True))(gradient)
    assert_close(results, expected(basis, gradient, True))


def project(basis, gradient, left):
    """Calls it as `in_subspace` does: under Auto axes, with the split of the gradient's type."""
    spec = matrix_spec(layout_of("w", gradient, Matrix()), gradient)
    side = -2 if left else -1
    kept = [*spec_of(gradient), *(None,) * gradient.ndim][: gradient.ndim]
    kept[side] = None
    run = lambda basis, gradient: project_and_norm(basis, gradient, left, spec.split)
    return on_auto_axes(run, (basis, gradient), like=(jax.P(*kept), jax.P(*kept)))


def lowered_for(sharding, shape, left, rank=256, dtype=jnp.float32):
    whole = NamedSharding(sharding.mesh, jax.P())
    side = shape[-2 if left else -1]
    basis = jax.ShapeDtypeStruct((side, rank), jnp.float32, sharding=whole)
    gradient = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    with jax.set_mesh(sharding.mesh):
        traced = jax.jit(project, static_argnums=2).trace(basis, gradient, left)
        return traced.lower(lowering_platforms=("tpu",))


def compiled_for(*args, **options):
    return lowered_for(*args, **options).compile(compiler_options=traffic.NO_CACHE)


@pytest.mark.parametrize(
    ("rank", "kernel"), [(1, False), (2, True), (256, True), (1024, False), (2048, False)]
)
def test_ranks_the_kernel_takes(rank, kernel):
    one = NamedSharding(jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,)), jax.P())
    assert has_kernel(lowered_for(one, (2, 4096, 512), True, rank).as_text()) == kernel


@pytest.mark.parametrize(("kinds", "kernel"), [("AA", False), ("EE", True), ("AE", False)])
def test_shardings_the_kernel_takes(kinds, kernel):
    types = tuple({"A": AxisType.Auto, "E": AxisType.Explicit}[k] for k in kinds)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=types)
    sharding = NamedSharding(mesh, jax.P(None, "a", "b"))
    assert has_kernel(lowered_for(sharding, (2, 1024, 512), True).as_text()) == kernel


def has_kernel(text):
    return "tpu_custom_call" in text


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ((4, 4096, 11008), True),
        ((4, 11008, 4096), False),
        ((24, 1024, 2736), True),
        ((24, 2736, 1024), False),
        ((24, 2048, 5461), True),
        ((24, 5461, 2048), False),
        ((2048, 5461), True),
    ],
)
def test_a_tpu_reads_the_gradient_once(shape, left, dtype):
    compiled = compiled_for(traffic.one_chip("v5e"), shape, left, dtype=dtype)
    assert has_kernel(compiled.as_text())
    size, free = np.prod(shape) * jnp.dtype(dtype).itemsize, shape[-1 if left else -2]
    results = 4 * 257 * np.prod(shape[:-2], dtype=int) * free
    basis = 4 * 256 * shape[-2 if left else -1]
    moved = compiled.cost_analysis()["bytes accessed"]
    assert size + results + basis <= moved <= 1.05 * (size + results) + 3 * basis


@pytest.mark.tpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("side", "rank"), [(5632, 256), (2368, 512), (40, 3)])
def test_what_the_kernel_takes_fits_every_chip(side, rank, left, chip):
    shape = (2, side, 6144) if left else (2, 6144, side)
    compiled = compiled_for(traffic.one_chip(chip), shape, left, rank)
    assert has_kernel(compiled.as_text())


@pytest.mark.tpu
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("spec", [("a",), (None, "a"), (None, None, "a"), (None, "a", "b")])
def test_no_chip_gathers_a_gradient(spec, left):
    chips = np.reshape(devices("v5e", 4), (2, 2))
    mesh = Mesh(chips, ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    shape = (4, 4096, 11008) if left else (4, 11008, 4096)
    compiled = compiled_for(NamedSharding(mesh, jax.P(*spec)), shape, left)
    text = compiled.as_text()
    assert has_kernel(text)
    assert not re.search("all-gather|all-to-all|collective-permute", text)
    projected = (*spec, None, None)[1 if left else 2]
    assert ("all-reduce" in text) == (projected is not None)
