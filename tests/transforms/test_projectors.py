"""Random bases and replayed ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt import projectors, recombine
from memopt.transforms.projectors import MatrixSpec, RefreshClock
from tests.yardstick import yardstick

LEAF = MatrixSpec("blocks/up", (3, 64, 96), jnp.float32)
random = pytest.mark.parametrize(
    "make", [projectors.gaussian, projectors.rademacher, projectors.sparse]
)


def basis(projector, spec=LEAF, step=0, every=10):
    return projector.basis(spec, None, RefreshClock.at(jnp.asarray(step, jnp.int32), every))


@random
def test_entries_have_variance_one_over_r(make):
    p = np.asarray(basis(make(64), MatrixSpec("w", (1000, 2000), jnp.float32)))
    assert p.shape == (1000, 64)
    assert abs(p.mean()) < 4 * (1 / 8) / np.sqrt(p.size)
    assert p.var() == pytest.approx(1 / 64, rel=0.03)
    np.testing.assert_allclose(np.corrcoef(p.T), np.eye(64), atol=0.16)


def test_rademacher_entries_are_signs():
    p = np.asarray(basis(projectors.rademacher(16)))
    assert set(np.unique(p)) == {-0.25, 0.25}


@random
def test_projection_keeps_lengths_on_average(make):
    g = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    ratios = [
        np.square(make(8, seed=seed).down(LEAF, basis(make(8, seed=seed)), g)).sum(-2)
        / np.square(g).sum(-2)
        for seed in range(100)
    ]
    np.testing.assert_allclose(np.mean(ratios), 1.0, atol=0.05)


@random
def test_a_basis_depends_on_seed_parameter_and_refresh_only(make):
    first = basis(make(4))
    np.testing.assert_array_equal(first, basis(make(4), step=9))
    for other in (
        basis(make(4), step=10),
        basis(make(4, seed=1)),
        basis(make(4), MatrixSpec("blocks/down", LEAF.shape, jnp.float32)),
    ):
        assert np.abs(first - other).max() > 0.1
    layer = MatrixSpec("blocks/2/up", LEAF.shape[1:], jnp.float32)
    np.testing.assert_array_equal(first, basis(make(4), layer))


@random
@pytest.mark.parametrize("stored", [False, True])
def test_stored_and_redrawn_are_the_same_numbers(make, stored):
    tx = memopt.in_subspace(
        optax.identity(), make(4, stored=stored), recombine.lift(), refresh_every=2
    )
    g = {"up": jnp.asarray(np.random.default_rng(1).normal(size=(3, 16, 24)), jnp.float32)}
    state = tx.init(g)
    lifted = []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(g, state)
        lifted.append(updates["up"])
    np.testing.assert_array_equal(lifted[0], lifted[1])
    np.testing.assert_array_equal(lifted[2], lifted[3])
    assert np.abs(lifted[1] - lifted[2]).max() > 0.1
    p = make(4).basis(MatrixSpec("up", (3, 16, 24), jnp.float32), None, RefreshClock.first())
    np.testing.assert_allclose(lifted[0], p @ (p.T @ g["up"]), rtol=1e-4, atol=1e-5)
    kept = sum(x.size for x in jax.tree.leaves(state.projector))
    assert kept == (16 * 4 if stored else 0)


@pytest.mark.parametrize(
    ("side", "shape", "low"),
    [
        ("short", (16, 24), (4, 24)),
        ("short", (24, 16), (24, 4)),
        ("short", (16, 16), (4, 16)),
        ("long", (16, 24), (16, 4)),
        ("left", (24, 16), (4, 16)),
        ("right", (16, 24), (16, 4)),
    ],
)
def test_the_side_decides_the_shape_of_a_projection(side, shape, low):
    projector = projectors.gaussian(4, side=side)
    spec = MatrixSpec("w", shape, jnp.float32)
    p = basis(projector, spec)
    r = projector.down(spec, p, jnp.ones(shape))
    assert r.shape == low
    assert projector.up(spec, p, r).shape == shape


def test_replay_reads_sides_off_the_shapes():
    r, m, n = 4, 16, 24
    side = lambda matrix, shape: projectors.replay({"w": {1: matrix}}).is_left(
        MatrixSpec("w", shape, jnp.float32)
    )
    assert side(np.ones((m, r)), (m, n))
    assert not side(np.ones((r, n)), (m, n))
    assert side(np.ones((r, n)), (n, m))
    assert side(np.ones((m, r)), (m, m))
    assert not side(np.ones((r, m)), (m, m))


def test_replay_uses_each_matrix_from_its_step_on():
    steps = {1: np.eye(4)[:, :1], 3: np.eye(4)[:, 1:2]}
    tx = memopt.in_subspace(
        optax.identity(), projectors.replay({"w": steps}), recombine.lift(), refresh_every=1
    )
    g = {"w": jnp.ones((4, 6))}
    state, rows = tx.init(g), []
    for _ in range(4):
        updates, state = tx.update(g, state)
        rows.append(int(jnp.argmax(updates["w"][:, 0])))
    assert rows == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("matrices", "sentence"),
    [
        ({"v": {1: np.ones((4, 2))}}, "leaf 'w' is unknown; did you mean|leaf 'w' is unknown"),
        ({"w": {2: np.ones((4, 2))}}, "must begin at step 1, not 2"),
        ({"w": {1: np.ones((5, 2))}}, r"longer side should be 4 \(rows\) or 6 \(columns\)"),
    ],
)
def test_bad_replays_are_refused(matrices, sentence):
    tx = memopt.in_subspace(optax.identity(), projectors.replay(matrices), recombine.lift())
    with pytest.raises(ValueError, match=sentence):
        tx.init({"w": jnp.ones((4, 6))})


def subspace_angle(p, q):
    """The sine of the largest angle between two column spaces, in float64."""
    p, q = (np.linalg.qr(np.asarray(x, np.float64))[0] for x in (p, q))
    return np.linalg.norm(q - p @ (p.swapaxes(-1, -2) @ q), ord=2, axis=(-2, -1)).max()


def gradient(shape, rank=None, seed=0):
    """A stack of matrices whose singular values fall by a fifth from one to the next."""
    draw = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(draw.normal(size=shape), full_matrices=False)
    values = 0.8 ** np.arange(min(shape[-2:]))
    values[len(values) if rank is None else rank :] = 0
    return (u * values) @ v


narrow = functools.partial(projectors.randomized_svd, iterations=2, oversample=8)


@pytest.mark.parametrize("make", [projectors.svd, projectors.randomized_svd, narrow])
@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize(
    "shape",
    [
        *((40, 24), (24, 40), (3, 24, 40)),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((24, 24), (2, 3, 40, 24))),
    ],
)
def test_singular_subspaces_are_numpys(make, side, shape):
    g = gradient(shape)
    spec, projector = MatrixSpec("w", shape, jnp.float32), make(4, side=side)
    p = np.asarray(basis_of(projector, spec, g))
    u, _, vt = np.linalg.svd(g)
    expected = u if projector.is_left(spec) else vt.swapaxes(-1, -2)
    # A sketch of 24 columns spans all; of one of 12 what is left of the fifth direction shows:
    # 0.8^(2·2+1) by two iterations.
    assert subspace_angle(p, expected[..., :4]) < (0.05 if make is narrow else 1e-4)
    np.testing.assert_allclose(
        p.swapaxes(-1, -2) @ p, np.broadcast_to(np.eye(4), (*shape[:-2], 4, 4)), atol=1e-5
    )


def basis_of(projector, spec, g):
    basis = jax.jit(lambda g: projector.basis(spec, g, RefreshClock.first()))
    return basis(jnp.asarray(g, jnp.float32))


@pytest.mark.parametrize("make", [projectors.svd, projectors.randomized_svd])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("side", ["short", "long"])
def test_rank_deficient_and_zero_gradients(make, rank, side):
    g = gradient((3, 24, 40), rank)
    spec, projector = MatrixSpec("w", g.shape, jnp.float32), make(4, side=side)
    p = np.asarray(basis_of(projector, spec, g))
    np.testing.assert_allclose(
        p.swapaxes(-1, -2) @ p, np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-5
    )
    lifted = projector.up(spec, p, projector.down(spec, p, jnp.asarray(g, jnp.float32)))
    np.testing.assert_allclose(lifted, g, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "iterations", "share"),
    [("falling", 2, 0.999), ("noise", 2, 0.92), ("noise", 6, 0.98)],
)
def test_a_randomized_svd_captures_the_energy_of_an_svd(kind, iterations, share):
    """Noise is the worst there is: all of its singular values are alike."""
    noise = np.random.default_rng(0).normal(size=(128, 344))
    g = noise if kind == "noise" else gradient((128, 344))
    spec = MatrixSpec("w", g.shape, jnp.float32)
    energy = lambda projector: np.square(np.asarray(basis_of(projector, spec, g)).T @ g).sum()
    captured = energy(projectors.randomized_svd(32, iterations=iterations))
    assert share < captured / energy(projectors.svd(32)) < 1.0001


# A structured sketch, from 128 columns on; one of 201 lines does not divide into groups.
@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((160, 201), None),
        pytest.param((201, 160), None, marks=pytest.mark.slow),  # the other side of (160, 201)
        ((2, 160, 200), None),
        ((160, 201), 3),
        ((160, 201), 0),
    ],
)
def test_a_sketch_alone_captures_what_falls(shape, rank, side):
    """Singular values as 1, 1/2, 1/3, …, and of matrices that lack most of them."""
    draw = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(draw.normal(size=shape), full_matrices=False)
    values = 1 / np.arange(1.0, 161)
    values[160 if rank is None else rank :] = 0
    g = (u * values) @ vt
    spec, projector = (
        MatrixSpec("w", shape, jnp.float32),
        projectors.randomized_svd(70, side=side, oversample=64),
    )
    p = np.asarray(basis_of(projector, spec, g), np.float64)
    np.testing.assert_allclose(
        p.swapaxes(-1, -2) @ p, np.broadcast_to(np.eye(70), (*shape[:-2], 70, 70)), atol=1e-5
    )
    low = np.asarray(projector.down(spec, p, g), np.float64)
    best = np.square(values[:70]).sum()
    assert (np.square(low).sum((-2, -1)) >= 0.99 * best - 1e-9).all()
    along = np.linalg.norm(low, axis=-1 if projector.is_left(spec) else -2)
    if rank != 0:  # each direction on its own, as moments that are kept need it
        np.testing.assert_allclose(
            along[..., :3], np.broadcast_to(values[:3], (*along.shape[:-1], 3)), rtol=0.1
        )


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1024, 1536), (1536, 1024)])
def test_a_randomized_svd_multiplies_no_more_than_its_passes(shape, iterations):
    """The sketch multiplies an eighth of what a dense one would, an iteration twice as much."""
    spec = MatrixSpec("w", shape, jnp.float32)
    projector = projectors.randomized_svd(448, iterations=iterations)
    g = jax.ShapeDtypeStruct(shape, jnp.float32)
    jaxpr = jax.make_jaxpr(lambda g: projector.basis(spec, g, RefreshClock.first()))(g)
    pass_ = 1024 * 1536 * 512
    assert products_of(jaxpr.jaxpr, 1024 * 1536) == [pass_ // 8] + 2 * iterations * [pass_]


def products_of(jaxpr, size):
    """Multiplications of each product that reads an array of so many numbers."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            a, b = (v.aval for v in eqn.invars)
            contracted = eqn.params["dimension_numbers"][0][0]
            if size in (a.size, b.size):
                found.append(eqn.outvars[0].aval.size * np.prod([a.shape[i] for i in contracted]))
        for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                found += products_of(getattr(inner, "jaxpr", inner), size)
    return found


def is_jaxpr(x):
    return hasattr(x, "eqns")


def test_online_pca_follows_the_subspace():
    """From a wrong start it comes to where the singular vectors are."""
    g = jnp.asarray(gradient((24, 40)), jnp.float32)
    start = projectors.gaussian(4)
    projector = projectors.online_pca(4, optimizer=optax.adam(1e-2), start=start)
    spec = MatrixSpec("w", g.shape, jnp.float32)

    @jax.jit
    def step(kept, t):
        _, kept = projector.basis_at(spec, kept, g, RefreshClock.at(t, 10), None)
        return kept, None

    kept = projector.init(spec)
    (p, *_), _ = jax.lax.scan(step, kept, jnp.arange(2000))
    assert subspace_angle(p, np.linalg.svd(np.asarray(g))[0][:, :4]) < 0.05
    np.testing.assert_allclose(p.T @ p, np.eye(4), atol=0.05)


def test_online_pca_learns_what_was_recorded():
    """The matrix at the end of the authors' own run."""
    params, gradients = yardstick.make_problem(zero=False)
    _, bases, _ = yardstick.load("osd_adamw_nozero")
    first = projectors.replay({spec: {1: steps[1]} for spec, steps in bases.items()})
    tx = memopt.online_subspace_descent(1e-2, rank=8, start=first, as_released=True)
    stacked = jax.tree.map(lambda *g: jnp.asarray(np.stack(g)), *gradients)
    params = jax.tree.map(jnp.asarray, params)
    step = lambda state, g: (tx.update(g, state, params)[1], None)
    state = jax.jit(lambda s, g: jax.lax.scan(step, s, g)[0])(tx.init(params), stacked)
    learnt = state.inner_states["matrices"].inner_state[0].projector[0]
    for spec, steps in bases.items():
        p = learnt[spec].T if steps[50].shape[0] == 8 else learnt[spec]
        np.testing.assert_allclose(p, steps[50], atol=3e-3 * np.abs(steps[50]).max())


def test_online_pca_survives_a_gradient_of_zeros():
    tx = memopt.in_subspace(optax.scale_by_adam(), projectors.online_pca(4), recombine.lift())
    g = {"up": jnp.asarray(gradient((2, 16, 24)), jnp.float32)}
    none = jax.tree.map(jnp.zeros_like, g)
    for order in ([g, none, g], [none, none, g]):
        state = tx.init(g)
        for gradients in order:
            updates, state = jax.jit(tx.update)(gradients, state)
            assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), (updates, state)))
        assert jnp.abs(updates["up"]).max() > 0.1


@pytest.mark.parametrize(
    ("make", "shape", "low"),
    [
        (projectors.columns, (3, 10, 6), (3, 3, 6)),
        (projectors.coordinates, (3, 10, 6), (3, 3, 6)),
        (projectors.blocks, (10, 4, 6), (3, 4, 6)),
    ],
)
def test_selections_are_entries_of_the_gradient(make, shape, low):
    """Over many draws each entry is chosen as often as the density says; no entry twice."""
    spec, g = (
        MatrixSpec("w", shape, jnp.float32),
        jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape),
    )
    seen = 0
    for seed in range(200):
        projector = make(0.25, seed=seed)
        p = basis(projector, spec)
        r = projector.down(spec, p, g)
        assert r.shape == low
        lifted = np.asarray(projector.up(spec, p, r))
        assert np.isin(lifted, [0, *np.asarray(g).ravel()]).all()
        np.testing.assert_array_equal(lifted[lifted != 0], np.asarray(g)[lifted != 0])
        seen = seen + (lifted != 0)
    np.testing.assert_allclose(seen / 200, 0.25, atol=0.14)


def test_columns_are_whole_lines_of_either_side():
    g = jnp.ones((8, 12))
    spec = MatrixSpec("w", g.shape, jnp.float32)
    for side, axis in (("left", 1), ("right", 0)):
        projector = projectors.columns(0.25, side=side)
        p = basis(projector, spec)
        lifted = np.asarray(projector.up(spec, p, projector.down(spec, p, g)))
        assert set(lifted.mean(axis)) == {0.0, 1.0}


def follow(projector, gradients, momentum=None):
    """The arrays that a projector keeps after each of some steps, and refreshes at each."""
    spec = MatrixSpec("w", gradients[0].shape, jnp.float32)

    def step(kept, at):
        clock = RefreshClock.at(at[0], 1)
        _, kept = projector.basis_at(spec, kept, at[1], clock, momentum)
        return kept, kept

    each = jnp.arange(len(gradients)), jnp.asarray(np.stack(gradients), jnp.float32)
    return jax.jit(lambda each: jax.lax.scan(step, projector.init(spec), each)[1])(each)


def test_intervals_are_doubled_where_the_first_vector_stays():
    """One matrix has always the same gradient, but for its sign, the other a new one."""
    same = gradient((24, 40))
    others = [gradient((24, 40), seed=seed) for seed in range(33)]
    steps = [np.stack([same * (-1) ** t, g]) for t, g in enumerate(others)]
    bases, doublings, _ = follow(projectors.lazy_svd(4), steps)
    # From the fifth cosine on: after steps 5, 6, 8, 16 and 32, each a multiple of its interval.
    expected = [0] * 5 + [1] + 2 * [2] + 8 * [3] + 16 * [4] + [5]
    assert doublings[:, 0].tolist() == expected
    assert not doublings[:, 1].any()
    changed = np.abs(np.diff(np.asarray(bases), axis=0)).max((-2, -1)) > 1e-6
    assert changed[:, 1].all()
    assert set(1 + np.flatnonzero(changed[:, 0])) <= {1, 2, 3, 4, 5, 6, 8, 16, 32}


def test_a_geodesic_step_rotates_one_direction_towards_the_gradient():
    """By the paper's angle, and the error falls by the squared slope at first."""
    g, start = gradient((24, 40)), np.linalg.qr(gradient((24, 4), seed=1))[0]
    first = projectors.replay({"w": {1: start}})
    angles, errors = {}, {}
    for step_size in (0.0, 1e-3, 0.1):
        projector = projectors.grassmann(4, step_size=step_size, normalize=False, start=first)
        p = np.asarray(follow(projector, [g, g])[0][1], np.float64)
        np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-6)
        cosines = np.linalg.svd(start.T @ p, compute_uv=False)
        angles[step_size] = np.arccos(np.clip(cosines, 0, 1))
        errors[step_size] = np.square(g - p @ p.T @ g).sum()
    slope = 2 * (g - start @ start.T @ g) @ (start.T @ g).T
    sigma = np.linalg.svd(slope, compute_uv=False)[0]
    np.testing.assert_allclose(angles[0.1], [0, 0, 0, 0.1 * sigma], atol=1e-3)
    assert (errors[1e-3] - errors[0.0]) / 1e-3 == pytest.approx(-(sigma**2), rel=0.01)


@pytest.mark.parametrize(
    "projector", [projectors.grassmann(4), projectors.coap(4, recalibrate_every=99)]
)
def test_a_gradient_inside_a_tracked_subspace_keeps_it(projector):
    bases = np.asarray(follow(projector, [gradient((24, 40), rank=4)] * 3)[0])
    np.testing.assert_allclose(bases[2], bases[0], atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_coap_computes_the_subspace_of_a_gradient_of_its_rank(shape):
    """From one that has something of each of its directions."""
    g, start = gradient(shape, rank=4), gradient(shape, seed=1)
    bases = np.asarray(follow(projectors.coap(4, recalibrate_every=2), [start, start, g])[0])
    side = g if shape[0] < shape[1] else g.T
    assert subspace_angle(np.linalg.svd(side)[0][:, :4], bases[2]) < 1e-3
    np.testing.assert_allclose(bases[2].T @ bases[2], np.eye(4), atol=1e-5)


@pytest.mark.parametrize("side", [5, 96, 100_003])
def test_cosines_are_exact_on_a_side_of_any_length(side):
    """The product of line and frequency is beyond 32 bits on the longest."""
    numbers = np.array([1, 4, side // 2, side])
    spec = MatrixSpec("w", (side, side), jnp.float32)
    found = projectors.dct(4).expand(spec, jnp.asarray(numbers)[:, None])
    lines = np.arange(side)[:, None]
    expected = np.sqrt(2 / side) * np.cos(lines * (2 * numbers - 1) * (np.pi / 2 / side))
    expected[0] /= np.sqrt(2)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.sqrt(2 / side))


@pytest.mark.parametrize("make", [projectors.dct, projectors.haar])
def test_all_of_a_fixed_transform_loses_nothing(make):
    g = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 14)), jnp.float32)
    spec, projector = MatrixSpec("w", g.shape, jnp.float32), make(1.0)
    p = basis_of(projector, spec, g)
    np.testing.assert_allclose(projector.up(spec, p, projector.down(spec, p, g)), g, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sums_of_lines_are_products_with_an_orthonormal_basis(side):
    """The last sum has fewer lines."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 14)), jnp.float32)
    spec, haar = MatrixSpec("w", g.shape, jnp.float32), projectors.haar(0.25, side=side)
    p = np.asarray(basis_of(haar, spec, g))
    np.testing.assert_allclose(p.T @ p, np.eye(p.shape[1]), atol=1e-6)
    low = haar.down(spec, p, g)
    np.testing.assert_allclose(low, p.T @ g if side == "left" else g @ p, atol=1e-5)
    lifted = p @ low if side == "left" else low @ p.T
    np.testing.assert_allclose(haar.up(spec, p, low), lifted, atol=1e-5)


def test_cosines_that_are_chosen_again_keep_their_moments():
    """The change of basis has a one for each, and zeros."""
    spec, dct = MatrixSpec("w", (8, 12), jnp.float32), projectors.dct(3)
    old, new = (dct.expand(spec, jnp.array(n)[:, None]) for n in ([2, 3, 7], [3, 7, 8]))
    m = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12)), jnp.float32)
    carried = dct.carry(spec, old, new, m, power=1)
    np.testing.assert_allclose(carried, jnp.stack([m[1], m[2], 0 * m[0]]), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: projectors.columns(0.3), "density must be one over a whole number.*got 0.3"),
        (lambda: projectors.blocks(0), "density must be one over a whole number.*got 0"),
        (lambda: projectors.haar(0.3), "density must be one over a power of two.*got 0.3"),
        (lambda: projectors.lazy_svd(4, threshold=1.5), "threshold must be between 0 and 1.*1.5"),
        (lambda: projectors.lazy_svd(4, queue=0), "queue must be at least 1, got 0"),
        (lambda: projectors.coap(4, recalibrate_every=0), "recalibrate_every must be at least 1"),
        (lambda: projectors.grassmann(4, step_size=-1.0), "step_size must be at least 0"),
        (lambda: projectors.haar(4), "density must be one over a power of two.*got 4"),
        (lambda: projectors.dct(4, norm="l3"), "norm 'l3' is unknown"),
        (lambda: projectors.randomized_svd(4, iterations=-1), "iterations must be at least 0"),
        (lambda: projectors.online_pca(4, penalty=-1.0), "penalty must be at least 0"),
        (lambda: projectors.power_iteration(4, rho=-0.1), "rho must be at least 0"),
    ],
)
def test_bad_options_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_rank_beyond_the_singular_vectors_is_refused():
    tx = memopt.in_subspace(optax.identity(), projectors.svd(8, side="long"), recombine.lift())
    with pytest.raises(ValueError, match="rank must be at most 4, the number of singular vectors"):
        tx.init({"w": jnp.ones((4, 16))})
