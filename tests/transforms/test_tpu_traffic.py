"""Bytes a step moves on a TPU v5e, by its own compiler; needs the extra `aot`, but no TPU."""

import math
import os

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import memopt

pytestmark = pytest.mark.tpu
LAYERS, D, FF = 4, 4096, 11008  # four blocks of LLaMA-7b, stacked
KERNELS = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D)}
KERNELS |= {"gate": (D, FF), "up": (D, FF), "down": (FF, D)}


@pytest.fixture(scope="module")
def chip():
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return SingleDeviceSharding(topology.devices[0])


@pytest.mark.parametrize(
    ("name", "most"), [("apollo_mini", 4.05), ("lion", 5.05), ("adafactor", 6.05), ("adamw", 7.05)]
)
def test_bytes_accessed_over_parameter_bytes(name, most, chip):
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), tree
    )
    params = place(
        {k: {"kernel": jax.ShapeDtypeStruct((LAYERS, *s), jnp.float32)} for k, s in KERNELS.items()}
    )
    tx = memopt.optimizer(name, 1e-3)

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = place(jax.eval_shape(tx.init, params))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    size = 4 * LAYERS * sum(map(math.prod, KERNELS.values()))
    traffic = compiled.cost_analysis()["bytes accessed"] / size
    assert 3 < traffic <= most
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * size
