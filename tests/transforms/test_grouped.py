"""Second moments that groups of entries share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.optimizers.adam_mini import hessian_blocks
from memopt.transforms.grouped import group_means, spread

KEY = jax.random.key(0)
PARAMS = {
    "embed": {"embedding": (12, 8)},
    "blocks": {
        "attn": {
            "q": {"kernel": (3, 8, 4, 2)},
            "k": {"kernel": (3, 8, 2, 2)},
            "v": {"kernel": (3, 8, 2, 2)},
            "o": {"kernel": (3, 4, 2, 8)},
        },
        "mlp": {"up": {"kernel": (3, 8, 16), "bias": (3, 16)}},
        "norm": {"scale": (3, 8)},
    },
    "lm_head": {"kernel": (8, 12)},
}
PARAMS = jax.tree.map(
    lambda shape: jax.random.normal(KEY, shape), PARAMS, is_leaf=lambda x: isinstance(x, tuple)
)


def sizes(tx, params=PARAMS):
    nu = jax.eval_shape(tx.init, params)[0].nu
    return {name: x.shape for name, x in memopt.trees.named_leaves(nu)[0]}


def test_adam_mini_has_a_number_for_each_token_head_and_output():
    attention, mlp = "blocks/attn/{}/kernel".format, "blocks/mlp/up/{}".format
    assert sizes(memopt.adam_mini(1e-3)) == {
        "embed/embedding": (12,),
        "lm_head/kernel": (12,),
        attention("q"): (3, 4),
        attention("k"): (3, 2),
        attention("v"): (3, 2, 2),
        attention("o"): (3, 8),
        mlp("kernel"): (3, 16),
        mlp("bias"): (3, 16),
        "blocks/norm/scale": (3,),
    }


def test_slim_adam_shares_over_outputs_but_for_queries_keys_and_tokens():
    attention, mlp = "blocks/attn/{}/kernel".format, "blocks/mlp/up/{}".format
    assert sizes(memopt.slim_adam(1e-3)) == {
        "embed/embedding": (12,),
        "lm_head/kernel": (12,),
        attention("q"): (3, 4, 2),
        attention("k"): (3, 2, 2),
        attention("v"): (3, 8),
        attention("o"): (3, 4, 2),
        mlp("kernel"): (3, 8),
        mlp("bias"): (3, 16),
        "blocks/norm/scale": (3, 8),
    }


def test_models_with_outputs_first_have_the_same_groups():
    turned = {
        "embedding": {"weight": jnp.ones((12, 8))},
        "layers": {"q_proj": {"weight": jnp.ones((16, 8))}, "up": {"weight": jnp.ones((24, 8))}},
        "unembed": {"weight": jnp.ones((12, 8))},
    }
    found = sizes(memopt.adam_mini(1e-3, head_dim=4, matrices=memopt.out_in), turned)
    assert found == {
        "embedding/weight": (12,),
        "layers/q_proj/weight": (4,),
        "layers/up/weight": (24,),
        "unembed/weight": (12,),
    }


@pytest.mark.parametrize(
    ("group", "shape"),
    [
        *[("entry", (8, 4, 2)), ("row", (8,)), ("column", (4, 2)), ("head", (4,)), ("matrix", ())],
        (("row", 4), (2,)),
    ],
)
def test_means_are_of_each_group(group, shape):
    layout = memopt.Layout("w", (), (0,), (1, 2))
    x = np.arange(64.0).reshape(8, 4, 2)
    means = group_means(layout, x, group)
    assert means.shape == shape
    back = np.broadcast_to(spread(layout, means, group), x.shape)
    for mean in np.unique(back):
        np.testing.assert_allclose(x[back == mean].mean(), mean, rtol=1e-6)


def test_entries_are_adam_and_no_momentum_is_rmsprop():
    params = {"w": PARAMS["lm_head"]["kernel"]}
    pairs = {
        memopt.scale_by_grouped_rms("entry"): optax.scale_by_adam(),
        memopt.scale_by_grouped_rms("entry", None, 0.9, debias=False): optax.scale_by_rms(
            0.9, 1e-8, eps_in_sqrt=False
        ),
    }
    for ours, theirs in pairs.items():
        states = ours.init(params), theirs.init(params)
        for scale in (1.0, -2.0, 0.5):
            g = jax.tree.map(lambda p, s=scale: s * p, params)
            updates, states = zip(
                ours.update(g, states[0]), theirs.update(g, states[1]), strict=True
            )
            np.testing.assert_allclose(updates[0]["w"], updates[1]["w"], rtol=1e-5)


def test_queries_have_a_number_for_each_head_of_a_group():
    """Levanter and Haliax store (groups of heads, heads of a group, size of a head, inputs)."""
    params = {"q_proj": {"weight": jnp.ones((2, 3, 4, 24))}, "up": {"q_bias": jnp.ones(8)}}
    matrices = {"q_proj": memopt.Matrix(-1, (0, 1, 2)), "up": None}
    assert sizes(memopt.adam_mini(1e-3, matrices=matrices), params) == {
        "q_proj/weight": (2, 3),
        "up/q_bias": (8,),
    }


def test_hyperparameters_can_be_injected_beside_groups():
    params = {"q": {"kernel": jnp.ones((8, 16))}}
    for options in ({"head_dim": 4}, {"groups": lambda layout: ("column", 4)}):
        tx = optax.inject_hyperparams(memopt.adam_mini)(1e-3, **options)
        state = jax.jit(tx.update)(params, tx.init(params), params)[1]
        assert state.inner_state[0].nu["q"]["kernel"].shape == (4,)


@pytest.mark.parametrize(
    "moments",
    [
        {"w": jnp.ones((2, 3))},
        [],
        [{"w": jnp.ones((2, 3), int)}],
        [{"w": jnp.ones((64, 384)).at[5, 7].set(jnp.nan)}],
    ],
)
def test_what_is_no_list_of_second_moments_is_refused(moments):
    with pytest.raises((TypeError, ValueError), match=r"second_moments must (be|have)"):
        memopt.choose_groups(moments)


@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_groups_are_chosen_where_second_moments_are_alike(size):
    rows, cols = jnp.geomspace(1, 100, 6)[:, None], jnp.geomspace(1, 100, 8)
    noise = lambda *shape: jnp.exp(0.05 * jax.random.normal(KEY, shape))
    moments = {
        "by_row": rows * noise(6, 8),
        "by_column": cols * noise(6, 8),
        "flat": noise(3, 6, 8),
        "rough": jnp.exp(3.0 * jax.random.normal(KEY, (6, 8))),
        "bias": noise(8),
    }
    moments = jax.tree.map(lambda v: size * v, moments)
    chosen = memopt.choose_groups([moments, moments])
    assert chosen.pop("flat") in ("row", "column", "matrix")
    assert chosen == {"by_row": "row", "by_column": "column", "rough": "entry", "bias": "entry"}
    memopt.slim_adam(1e-3, groups=memopt.choose_groups([moments])).init(moments)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ("rows", "groups 'rows' is unknown; did you mean 'row'"),
        ({"v": "row"}, r"groups has no entry for 'w'; it has \['v'\]"),
        ("head", r"groups\['w'\] must not be 'head'.*give \('column', size of a head\)"),
        (
            ("column", 5),
            "groups, or the head_dim .*, must divide the columns of 'w'.*blocks of 5 for 12",
        ),
        (("column", 0), r"at least one row or column, got \('column', 0\)"),
        (("column",), r"groups \('column',\) is unknown"),
        (("matrix", 2), r"blocks of rows or columns only, got \('matrix', 2\)"),
    ],
)
def test_groups_that_a_parameter_does_not_have_are_refused(groups, says):
    with pytest.raises(ValueError, match=says):
        memopt.scale_by_grouped_rms(groups).init({"w": jnp.ones((8, 12))})


def test_heads_of_unknown_size_have_a_number_for_each_output():
    layout = memopt.Layout("attn/q/kernel", (), (0,), (1,))
    assert hessian_blocks(layout) == "column"
    assert hessian_blocks(layout, head_dim=4) == ("column", 4)
    low_rank = layout._replace(name="attn/q_proj/kernel_lora_a")
    assert hessian_blocks(low_rank, head_dim=4) == "column"
    assert hessian_blocks(low_rank._replace(name="attn/q_proj/kernel_lora_b"), 4) == ("column", 4)
