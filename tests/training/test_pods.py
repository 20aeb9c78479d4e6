"""Whole steps, compiled for 16 chips of a TPU pod by its own compiler; `.ci/run` runs these."""

import dataclasses
import functools

import pytest

from benchmarks import hlo, memory
from memopt.models.config import PRESETS
from memopt.planning.step_memory import step_memory
from tests.training.nano import NANO

pytestmark = pytest.mark.tpu
SMALL = dataclasses.replace(
    NANO,
    hidden_size=512,
    intermediate_size=1024,
    num_heads=4,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=1024,
    max_seq_len=256,
)
MESHES = {"fsdp": ("fsdp=16", 16), "3d": ("data=2,fsdp=4,tensor=2", 8)}


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)


@functools.cache
def compiled(optimizer, mesh, release, state=None):
    axes, rows = MESHES[mesh]
    options = memory.Options(
        model="small", release=release, state=state, mesh=axes, batch_size=rows, seq_len=256
    )
    step, like = memory.compile_step(optimizer, options)
    return hlo.collectives(step.as_text()), step_memory(step, like.params, like.opt_state)


@pytest.mark.parametrize(
    ("optimizer", "mesh", "release", "state"),
    [
        ("apollo_mini", "fsdp", False, None),
        ("adafactor", "3d", False, None),
        ("apollo_mini", "fsdp", True, "int8"),
    ],
)
def test_an_optimizer_adds_little_to_what_moves(optimizer, mesh, release, state):
    """Sums of rows and columns, projections, flags: nothing of a parameter's size."""
    found, sizes = compiled(optimizer, mesh, release, state)
    plain, _ = compiled("sgd", mesh, release)
    assert hlo.total_bytes(plain) > 0
    assert hlo.total_bytes(found) <= 1.05 * hlo.total_bytes(plain)
    assert max(one.largest for one in found) <= max(one.largest for one in plain)
    assert sizes.state < sizes.parameters
