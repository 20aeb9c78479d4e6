"""Collectives of programs compiled for eight host devices, and of lines of a TPU's."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding

from memopt.planning import chips, hlo

SIDE = 64
SIZE = 4 * SIDE * SIDE
SPLIT = jax.P("x")


def on_mesh(f, spec):
    """The text of ``f(w)``, w of 64×64 float32 on eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    w = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(w).compile().as_text()


def shard_mapped(f, spec, out):
    return on_mesh(jax.shard_map(f, in_specs=spec, out_specs=out, check_vma=False), spec)


def gather(w):
    return jax.lax.with_sharding_constraint(jnp.sin(w), jax.P())


def in_a_loop(w):
    step = lambda w, _: (jax.lax.with_sharding_constraint(gather(w) @ w, SPLIT), None)
    return jax.lax.scan(step, w, None, length=5)[0]


@pytest.mark.parametrize(
    ("kind", "text", "count", "size"),
    [
        ("all-gather", lambda: on_mesh(gather, SPLIT), 1, SIZE),
        ("all-gather", lambda: on_mesh(in_a_loop, SPLIT), 5, SIZE),
        (
            "all-gather",
            lambda: on_mesh(
                lambda w: jax.lax.scan(lambda w, _: (in_a_loop(w), None), w, None, length=3)[0],
                SPLIT,
            ),
            *(15, SIZE),
        ),
        (
            "reduce-scatter",
            lambda: shard_mapped(
                lambda w: jax.lax.psum_scatter(w, "x", tiled=True), jax.P(), SPLIT
            ),
            *(1, SIZE),
        ),
        (
            "all-reduce",
            lambda: shard_mapped(lambda w: jax.lax.psum(w, "x"), SPLIT, jax.P()),
            *(1, 2 * SIZE // 8),
        ),
        (
            "all-to-all",
            lambda: shard_mapped(
                lambda w: jax.lax.all_to_all(w, "x", 1, 0, tiled=True), SPLIT, SPLIT
            ),
            *(1, SIZE // 8),
        ),
        (
            "collective-permute",
            lambda: shard_mapped(
                lambda w: jax.lax.ppermute(w, "x", [(i, (i + 1) % 8) for i in range(8)]),
                *(SPLIT, SPLIT),
            ),
            *(1, SIZE // 8),
        ),
    ],
    ids=["gather", "loop", "loops", "scatter", "reduce", "all_to_all", "permute"],
)
def test_what_moves_how_often(kind, text, count, size):
    found = hlo.collectives(text())
    assert hlo.by_kind(found) == {kind: {"bytes": count * size, "count": count}}
    assert hlo.total_bytes(found) == count * size


def test_the_largest_array_of_several():
    text = on_mesh(lambda w: (gather(w), gather(w)[:8] * 2), SPLIT)
    assert max(c.largest for c in hlo.collectives(text)) == SIDE * SIDE


def test_the_branch_of_a_refresh_counts_when_it_is_asked_for():
    sharded = functools.partial(jax.lax.with_sharding_constraint, shardings=SPLIT)

    def step(w):
        refreshed = lambda: sharded(jnp.linalg.qr(gather(w))[0])
        return jax.lax.cond(w[0, 0] > 0, refreshed, lambda: w)

    text = on_mesh(step, SPLIT)
    between = hlo.by_kind(hlo.collectives(text))
    assert "all-gather" not in between
    assert hlo.by_kind(hlo.collectives(text, refresh=True))["all-gather"]["bytes"] == SIZE


def fsdp_product(devices):
    """A product with weights split over the devices, and its gradients: text, bytes of weights."""
    mesh = jax.sharding.Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    place = lambda *shape: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, SPLIT)
    )
    w, x = place(1024, 2048), place(512 * len(devices), 1024)
    gradients = jax.grad(lambda w, x: jnp.square(jnp.tanh(x @ w)).sum(), argnums=(0, 1))
    jitted = jax.jit(gradients, out_shardings=(w.sharding, x.sharding))
    return jitted.lower(w, x).compile().as_text(), 4 * w.size


def test_a_product_gathers_its_weights_and_sums_their_gradient():
    text, weights = fsdp_product(jax.devices()[:8])
    assert hlo.by_kind(hlo.collectives(text)) == {
        "all-gather": {"bytes": weights, "count": 1},
        "all-reduce": {"bytes": 2 * weights, "count": 1},
    }


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("count", "moved"),
    [
        (8, {"all-gather": (1, 1), "all-reduce": (2, 1)}),
        # The compiler gathers by summing arrays that are zero but for a device's own part.
        (64, {"all-reduce": (4, 2)}),
    ],
)
def test_a_tpus_product_gathers_its_weights_and_sums_their_gradient(count, moved):
    text, weights = fsdp_product(chips.devices("v5p", count))
    assert hlo.by_kind(hlo.collectives(text)) == {
        kind: {"bytes": times * weights, "count": count} for kind, (times, count) in moved.items()
    }


TPU = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%x, %y)
}

%first (p.0: bf16[16,8]) -> (bf16[16,8], bf16[256,8], u32[]) {
  %p.0 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.46 = bf16[256,8]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %start = (bf16[16,8]{1,0:T(8,128)S(1)}, bf16[256,8]{1,0:T(8,128)}, u32[]{:S(2)}) \
custom-call(%all-gather.46), custom_call_target="AsyncCollectiveStart"
}

%then (p.1: bf16[16,8], p.2: bf16[256,8]) -> bf16[256,8] {
  %p.1 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.2 = bf16[256,8]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %all-gather.48 = bf16[256,8]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, \
dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%body (p.3: (u32[], bf16[16,8], bf16[256,8], u32[])) -> (u32[], bf16[16,8], bf16[256,8], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %p.3 = (u32[]{:T(128)}, bf16[16,8]{1,0}, bf16[256,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p.3), index=0
  %w = bf16[16,8]{1,0} get-tuple-element(%p.3), index=1
  %all = bf16[256,8]{1,0} get-tuple-element(%p.3), index=2
  %n = u32[]{:T(128)} get-tuple-element(%p.3), index=3
  %permute-start = (bf16[16,8]{1,0}, bf16[16,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%w), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %working = bf16[256,8]{1,0} fusion(%w, %all), kind=kOutput, calls=%then
  %permute-done = bf16[16,8]{1,0} collective-permute-done(%permute-start)
  %next = u32[]{:T(128)} add(%i, %two)
  %moved = u32[]{:T(128)} copy(%next)
  ROOT %out = (u32[]{:T(128)}, bf16[16,8]{1,0}, bf16[256,8]{1,0}, u32[]{:T(128)}) \
tuple(%moved, %permute-done, %working, %n)
}

%condition (p.4: (u32[], bf16[16,8], bf16[256,8], u32[])) -> pred[] {
  %p.4 = (u32[]{:T(128)}, bf16[16,8]{1,0}, bf16[256,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%p.4), index=0
  %m = u32[]{:T(128)} get-tuple-element(%p.4), index=3
  ROOT %less = pred[]{:T(512)} compare(%j, %m), direction=LT
}

ENTRY %main (w.1: bf16[16,8], s: f32[4]) -> (bf16[256,8], f32[4], f32[]) {
  %w.1 = bf16[16,8]{1,0} parameter(0)
  %s = f32[4]{0} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %seven = u32[]{:T(128)} constant(7)
  %copy = u32[]{:T(128)} copy(%zero)
  %async-start = (bf16[16,8]{1,0}, bf16[256,8]{1,0}, u32[]{:S(2)}) fusion(%w.1), kind=kCustom, \
calls=%first
  %buffer = bf16[256,8]{1,0} get-tuple-element(%async-start), index=1
  %carried = (u32[]{:T(128)}, bf16[16,8]{1,0}, bf16[256,8]{1,0}, u32[]{:T(128)}) \
tuple(%copy, %w.1, /*index=2*/%buffer, %seven)
  %while = (u32[]{:T(128)}, bf16[16,8]{1,0}, bf16[256,8]{1,0}, u32[]{:T(128)}) while(%carried), \
condition=%condition, body=%body
  %gathered = bf16[256,8]{1,0} get-tuple-element(%while), index=2
  %c = f32[]{:T(128)} constant(1)
  %sums = (f32[4]{0:T(128)S(1)}, f32[]{:T(128)}) all-reduce(%s, %c), channel_id=3, to_apply=%add
  %sum.0 = f32[4]{0} get-tuple-element(%sums), index=0
  %sum.1 = f32[] get-tuple-element(%sums), index=1
  ROOT %results = (bf16[256,8]{1,0}, f32[4]{0}, f32[]) tuple(%gathered, %sum.0, %sum.1)
}
"""


def test_a_program_of_a_tpu():
    """A gather that runs behind a loop, whose counter goes from 0 to 7 in steps of 2."""
    assert hlo.by_kind(hlo.collectives(TPU)) == {
        "all-gather": {"bytes": 2 * 256 * 8, "count": 1},
        "all-reduce": {"bytes": 2 * (16 + 4), "count": 1},
        "collective-permute": {"bytes": 4 * 2 * 16 * 8, "count": 4},
    }


def test_a_loop_that_does_not_say_how_often_it_turns():
    text = TPU.replace("%seven = u32[]{:T(128)} constant(7)", "%seven = u32[] parameter(2)")
    with pytest.raises(ValueError, match="loop 'while' does not say how often it turns"):
        hlo.collectives(text)
