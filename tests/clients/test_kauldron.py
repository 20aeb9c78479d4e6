"""Kauldron's trainer on its vision transformer, where it is installed (extra `kauldron`)."""

import chex
import jax
import numpy as np
import pytest

import memopt
from tests.clients.optimizers import METHODS
from tests.clients.page import run
from tests.clients.trainers import SOME, assert_on_the_page, assert_same
from tests.clients.training import HEADS, HIDDEN, WIDTH, rate

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # its own warnings
kd = pytest.importorskip("kauldron.kd")

STEPS = 3  # Kauldron counts from 0 and takes one more; the last checkpoint is after two
IMAGES = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype("float32")


def given(directory):
    """The names that the page's code uses without defining them: a model, its data and losses."""
    batch = {"image": IMAGES, "label": np.arange(8)[:, None] % 4}
    encoder = kd.nn.VitEncoder.from_spec(
        num_heads=HEADS, hidden_size=WIDTH, num_layers=1, patch_size=4, mlp_size=HIDDEN
    )
    loss = kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds.logits", labels="batch.label")
    return {
        "directory": directory,
        "seed": 0,
        "dataset": kd.data.InMemoryPipeline(loader=lambda: batch, batch_size=8, seed=0),
        "model": kd.nn.Vit(encoder=encoder, num_classes=4, image="batch.image"),
        "losses": {"cross-entropy": loss},
        "steps": STEPS,
    }


@pytest.mark.parametrize("method", SOME)
def test_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(method, tmp_path):
    names = given(tmp_path) | {"tx": METHODS[method](rate(method))}
    blocks = ("Kauldron", "trainer", "train")
    whole = run(dict(names), *blocks)
    resumed = run(dict(names), *blocks, seed=1)  # other weights, which the checkpoint replaces
    assert whole["trainer"].checkpointer.latest_step == STEPS - 1
    assert int(resumed["state"].step) == STEPS + 1
    chex.assert_tree_all_finite(whole["state"])
    assert_same(whole["state"], resumed["state"])
    for tree in (whole["state"].params, whole["state"].opt_state):
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(tree))


def test_the_page_has_its_names_and_configuration(tmp_path):
    names = run(given(tmp_path), "Kauldron", "optimizer", "trainer")
    tx, params = names["tx"], names["trainer"].state_specs.params
    assert_on_the_page("Kauldron", tx, params)
    made = kd.konfig.resolve(run({}, "Kauldron", "configuration")["optimizer"])
    assert memopt.state_bytes(made, params) == memopt.state_bytes(tx, params)
