"""A model split over eight devices computes what one device computes, under both axis types."""

import dataclasses
import logging
import re

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from memopt.models.llama import (
    Llama,
    abstract_model,
    from_hugging_face,
    param_shardings,
    preset,
)
from tests.models.examples import SMALL, by_name, init, logits, mean_loss, split, value_and_grad

AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]
MESHES = [{"data": 2, "fsdp": 4}, {"tensor": 2}]


def quick_with(quick):
    """Both types of axes; the other one with ``-m slow``."""
    marks = lambda axis_type: [] if axis_type == quick else [pytest.mark.slow]
    types = [pytest.param(axis_type, marks=marks(axis_type)) for axis_type in AXIS_TYPES]
    return pytest.mark.parametrize("axis_type", types)


def make_mesh(sizes, axis_type=AxisType.Auto):
    types = (axis_type,) * len(sizes)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


@pytest.mark.parametrize(
    ("sizes", "axis_type"), list(zip(MESHES, AXIS_TYPES, strict=True)), ids=str
)
def test_split_loss_and_gradients_are_the_whole_ones(model, sizes, axis_type):
    graphdef, params = split(model)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 13), dtype=np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    chunks = {"logits_bytes": 4 * 64 * 5}
    whole = jax.device_get(value_and_grad(graphdef, params, batch, **chunks))

    mesh = make_mesh(sizes, axis_type)
    shardings = param_shardings(model, mesh)
    objective = lambda params, batch: mean_loss(nnx.merge(graphdef, params), batch, **chunks)
    step = jax.jit(jax.value_and_grad(objective), out_shardings=(None, shardings))
    rows = jax.P(tuple(axis for axis in sizes if axis != "tensor") or None)
    with jax.set_mesh(mesh):
        value, gradient = step(jax.device_put(params, shardings), jax.device_put(batch, rows))
    chex.assert_trees_all_close(jax.device_get((value, gradient)), whole, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, gradient), shardings)


def test_options_of_other_families_are_split_alike(with_options):
    graphdef, params = split(with_options)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 13), dtype=np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    whole = jax.device_get(value_and_grad(graphdef, params, batch))
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, AxisType.Explicit)
    shardings = param_shardings(with_options, mesh)
    assert shardings["blocks"]["attention"]["q"]["bias"].spec == jax.P(None, "tensor")
    assert shardings["blocks"]["attention"]["o"]["bias"].spec == jax.P(None, "fsdp")
    assert shardings["blocks"]["attention"]["k_norm"]["scale"].spec == jax.P(None, None)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings), jax.device_put(batch, jax.P(("data", "fsdp")))
        found = jax.device_get(value_and_grad(graphdef, *placed))
    chex.assert_trees_all_close(found, whole, rtol=1e-5, atol=1e-5)


@quick_with(AxisType.Explicit)
def test_split_recorded_model_gives_the_recorded_numbers(recorded, recorded_directory, axis_type):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    model = from_hugging_face(recorded_directory, mesh=mesh)
    with jax.set_mesh(mesh):
        ours = logits(model, recorded["token_ids"])
        gradient = by_name(value_and_grad(*split(model), recorded["batch"])[1])
    np.testing.assert_allclose(ours, recorded["logits"], atol=1e-5)
    for name, theirs in recorded["gradients"].items():
        assert np.linalg.norm(gradient[name] - theirs) <= 1e-5 * np.linalg.norm(theirs), name


def program_of_gradients(sizes, axis_type):
    mesh = make_mesh(sizes, axis_type)
    graphdef, params = split(abstract_model(SMALL))
    objective = lambda params, batch: mean_loss(nnx.merge(graphdef, params), batch)
    shardings = param_shardings(abstract_model(SMALL), mesh)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
        tokens = jax.ShapeDtypeStruct((16, 24), np.int32, sharding=rows)
        step = jax.jit(jax.grad(objective), out_shardings=shardings)
        lowered = step.lower(
            jax.tree.map(place, params, shardings), {"inputs": tokens, "targets": tokens}
        )
        return lowered.compile().as_text()


@quick_with(AxisType.Explicit)
def test_parameters_are_gathered_and_activations_are_not(axis_type):
    program = program_of_gradients({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    gathered = re.findall(r'= f32\[([\d,]+)\]\S* all-gather\(.*op_name="([^"]*)"', program)
    shapes = [shape for shape, source in gathered if "_take" not in source]
    assert shapes
    assert all(len(shape.split(",")) == 2 for shape in shapes), shapes


@quick_with(AxisType.Auto)
def test_no_device_holds_the_whole_embedding_or_its_gradient(axis_type):
    program = program_of_gradients({"data": 2, "fsdp": 4}, axis_type)
    of_lookup = "\n".join(line for line in program.splitlines() if "(_take)" in line)
    assert f"[{SMALL.vocab_size},{SMALL.hidden_size // 4}]" in of_lookup
    assert f"[{SMALL.vocab_size},{SMALL.hidden_size}]" not in of_lookup


@quick_with(AxisType.Explicit)
def test_parameters_are_born_split_and_equal(axis_type):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    shardings = param_shardings(abstract_model(SMALL), mesh)
    create = lambda key: nnx.to_pure_dict(nnx.state(Llama(SMALL, rngs=nnx.Rngs(key)), nnx.Param))
    with jax.set_mesh(mesh):
        params = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, params), shardings)
    chex.assert_trees_all_close(jax.device_get(params), create(jax.random.key(0)), atol=1e-7)


def specs(name, sizes):
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    shardings = param_shardings(abstract_model(preset(name)), mesh)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree.leaves_with_path(shardings)
    }


def test_logical_axes_go_to_their_mesh_axes():
    assert specs("tiny", {"data": 2, "fsdp": 2, "tensor": 2}) == {
        "embed/embedding": jax.P("tensor", "fsdp"),
        "blocks/attention_norm/scale": jax.P(None, None),
        "blocks/attention/q/kernel": jax.P(None, "fsdp", "tensor"),
        "blocks/attention/k/kernel": jax.P(None, "fsdp", "tensor"),
        "blocks/attention/v/kernel": jax.P(None, "fsdp", "tensor"),
        "blocks/attention/o/kernel": jax.P(None, "tensor", "fsdp"),
        "blocks/mlp_norm/scale": jax.P(None, None),
        "blocks/mlp/gate/kernel": jax.P(None, "fsdp", "tensor"),
        "blocks/mlp/up/kernel": jax.P(None, "fsdp", "tensor"),
        "blocks/mlp/down/kernel": jax.P(None, "tensor", "fsdp"),
        "final_norm/scale": jax.P(None),
        "head/kernel": jax.P("fsdp", "tensor"),
    }


def test_the_odd_width_of_1b_is_not_cut_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="memopt.models"):
        placed = specs("1b", {"fsdp": 4, "tensor": 2})
    assert placed["blocks/mlp/gate/kernel"] == jax.P(None, ("fsdp", "tensor"), None)
    assert placed["blocks/mlp/down/kernel"] == jax.P(None, None, ("fsdp", "tensor"))
    assert placed["blocks/attention/q/kernel"] == jax.P(None, "fsdp", "tensor")
    assert caplog.messages[0] == (
        "blocks/mlp/down/kernel: mlp=5461 does not divide over tensor=2; embed=2048 is split "
        "there instead."
    )
    assert len(caplog.messages) == 3


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("tiny", {"fsdp": 5}, "axis embed of size 192 does not divide over mesh axis fsdp=5; choo"),
        ("tiny", {"tensor": 8}, "attention/k/kernel: axis kv_heads of size 4 does not divide over"),
        ("1b", {"fsdp": 2048, "tensor": 2}, "embed of size 2048 does not divide over mesh axis fs"),
        ("tiny", {"expert": 2}, "Mesh axis 'expert' is unknown. Allowed: data, fsdp, tensor"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        specs(name, sizes)


def test_a_batch_that_does_not_divide_is_still_right(model):
    tokens = np.ones((3, 5), np.int32)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4})):
        ours = logits(model, tokens)
    np.testing.assert_allclose(ours, logits(model, tokens), atol=1e-6)


def test_an_odd_width_runs_when_split_elsewhere():
    config = dataclasses.replace(SMALL, intermediate_size=33)
    model = init(config)
    graphdef, params = split(model)
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, AxisType.Explicit)
    tokens = np.ones((2, 5), np.int32)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(model, mesh))
        ours = logits(nnx.merge(graphdef, placed), tokens)
    np.testing.assert_allclose(ours, logits(model, tokens), atol=1e-6)
