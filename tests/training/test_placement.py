"""The state of a run lies as `memopt.state_sharding` says."""

import jax
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

import memopt
from memopt.models import llama
from memopt.planning.step_memory import bytes_here
from memopt.training.placement import abstract_state, make_mesh, place_update
from tests.optimizers.kinds import KINDS, slow_unless


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize(
    "tx",
    [
        memopt.adafactor(1e-3),
        memopt.galore(1e-3, rank=0.25),
        memopt.quantize_state(optax.scale_by_adam()),
    ],
    ids=["factors", "low-rank moments", "codes and scales"],
)
def test_state_of_no_matrix_is_whole(tx, weights):
    mesh = make_mesh("fsdp=4,tensor=2", rows=4)
    params = llama.abstract_params(llama.preset("tiny"), mesh)
    params = memopt.quantize_params(params, weights) if weights else params
    state = abstract_state(params, tx, mesh)
    placed = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    assert placed(state.params) == placed(params)
    found = jax.tree_util.tree_leaves_with_path(state.opt_state)
    split = {jax.tree_util.keystr(path): any(x.sharding.spec) for path, x in found}
    assert len(split) > 7
    assert all(is_split for name, is_split in split.items() if "kernel" in name)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=slow_unless(name in {*KINDS, "adamw"} - {"ldadam"}))
        for name in (*memopt.available(), "adamw-int8")
    ],
)
def test_what_a_chip_holds_falls_with_their_number(name):
    tx = memopt.optimizer(name.removesuffix("-int8"), 1e-3)
    tx = memopt.quantize_state(tx, "int8") if name.endswith("-int8") else tx
    held = {}
    for chips in (16, 256):
        mesh = AbstractMesh((chips,), ("fsdp",), axis_types=(AxisType.Auto,))
        params = llama.abstract_params(llama.preset("7b"), mesh)
        state = abstract_state(params, tx, mesh)
        held[chips] = bytes_here((state.params, state.opt_state))
    assert held[16] / held[256] >= 0.85 * 256 / 16


def test_where_an_update_is_made():
    params = llama.abstract_params(llama.preset("tiny"), make_mesh("fsdp=4", rows=4))
    places = lambda name, one_layer_at_a_time: place_update(
        tx, name, params, one_layer_at_a_time=one_layer_at_a_time
    )[1]
    tx = memopt.galore(1e-3)
    at = lambda tree: tree["blocks"]["mlp"]["up"]["kernel"].sharding.spec
    assert at(params) == jax.P(None, "fsdp", None)
    assert at(places("galore", False)) == jax.P("fsdp")
    assert places("galore", True) is params
    assert place_update(tx, "lion", params, one_layer_at_a_time=False) == (tx, params)
