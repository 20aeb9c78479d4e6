"""Chips by name, their compilers, and the memory that these leave to a program."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from memopt.planning.chips import CHIPS, GPUS, TPUS, compiler, devices

needs_a_compiler = [
    *(pytest.param(chip, marks=pytest.mark.tpu) for chip in TPUS),
    *(pytest.param(chip, marks=pytest.mark.gpu) for chip in GPUS),
]


@functools.cache
def compiled(chip, count, rows=64):
    """A small step, data-parallel on some devices: the new weight of one layer."""
    mesh = Mesh(devices(chip, count), ("data",), axis_types=(AxisType.Auto,))
    like = lambda spec, *shape: jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )
    loss = lambda w, x: jnp.mean(jnp.square(jnp.tanh(x @ w).astype(jnp.float32)))
    step = lambda w, x: w - jax.grad(loss)(w, x)
    w, x = like(jax.P(), 256, 256), like(jax.P("data"), rows, 256)
    return jax.jit(step, donate_argnums=0).lower(w, x).compile()


@pytest.mark.parametrize("chip", needs_a_compiler)
@pytest.mark.parametrize("count", [1, 16])
def test_the_compiler_of_every_chip_compiles_a_step(chip, count):
    stats = compiled(chip, count).memory_analysis()
    assert stats.argument_size_in_bytes >= 2 * 256 * 256 + 2 * 64 // count * 256
    assert stats.alias_size_in_bytes >= 2 * 256 * 256


@pytest.mark.tpu
@pytest.mark.parametrize("chip", TPUS)
def test_the_memory_of_a_tpu_is_what_its_compiler_says(chip):
    with pytest.raises(jax.errors.JaxRuntimeError, match="exceeds available HBM") as refused:
        compiled(chip, 1, rows=2**32)
    said = re.search(r"available HBM \(([\d.]+)G\)", str(refused.value))
    assert TPUS[chip].memory == int(float(said[1]) * 2**30)


@pytest.mark.tpu
def test_a_device_is_a_chip_except_on_ironwood():
    kinds = {chip: {d.id: d.coords for d in devices(chip, 4)} for chip in TPUS}
    assert {chip: len(set(map(tuple, at.values()))) for chip, at in kinds.items()} == {
        **dict.fromkeys(TPUS, 4),
        "tpu7x": 2,
    }


def test_every_gpu_has_as_much_memory_as_its_name_says():
    sold = {"a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "b200": 180, "l40s": 48}
    sold |= {"rtx3090": 24, "rtx4090": 24, "rtx5090": 32}
    # Drivers and error correction take a part; sellers mean 10⁹ or 2³⁰.
    assert {chip: 0.9 * 2**30 < gpu.memory / sold[chip] <= 2**30 for chip, gpu in GPUS.items()} == (
        dict.fromkeys(sold, True)
    )


def test_an_unknown_chip_is_refused_with_the_nearest():
    for ask in (devices, compiler):
        with pytest.raises(ValueError, match="chip 'v5' is unknown; did you mean 'v5"):
            ask("v5")


def test_more_devices_than_this_machine_has_are_refused_with_the_way_to_get_them():
    with pytest.raises(ValueError, match="--xla_force_host_platform_device_count=1000"):
        devices("cpu", 1000)
    assert devices("cpu") == jax.devices()[:1]


def test_the_compiler_of_this_machine_is_jaxlib():
    assert re.fullmatch(r"jaxlib \d+\.\d+\..*", compiler("cpu"))
    assert "cpu" not in CHIPS
