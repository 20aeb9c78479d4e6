"""Combines a method for hidden matrices with one for all other parameters."""

from collections.abc import Callable
from typing import Any, TypedDict

import optax

from memopt.checked import checked
from memopt.errors import check_unused
from memopt.matrices import Matrices, map_matrices
from memopt.parameters import reading_whole_trees
from memopt.state.precision import in_float32
from memopt.state.quantized_state import StateChoice, store_state
from memopt.transforms.decay import Decayed, decay_as_released


@checked
def matrices_and_rest(
    method: optax.GradientTransformation,
    rest: optax.GradientTransformation | None,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Partitions a tree: `method` for its hidden matrices, `rest` for everything else.

    Args:
        method: updates the matrices.
        rest: updates embeddings, output head, norms and biases; None means `method`.
        matrices: which leaves are matrices; see `memopt.hidden_matrices`.

    Example:
        >>> import memopt, jax.numpy as jnp
        >>> tx = memopt.matrices_and_rest(optax.sgd(1e-2), optax.adam(1e-3))
        >>> params = {"up": {"kernel": jnp.ones((8, 16))}, "norm": {"scale": jnp.ones(8)}}
        >>> memopt.state_bytes(tx, params).states
        {'norm/scale': 64, 'up/kernel': 0}
    """
    if rest is None:
        return optax.with_extra_args_support(method)

    def labels(tree: Any) -> Any:
        label = lambda layout, _: "matrices" if layout.is_matrix else "rest"
        return map_matrices(label, tree, matrices=matrices)

    return reading_whole_trees(optax.partition({"matrices": method, "rest": rest}, labels))


class Common(TypedDict, total=False):
    """Options that every method has.

    Attributes:
        matrices: which leaves are matrices, and which axes are their rows and columns; by default
            the hidden matrices, see `memopt.hidden_matrices`, or every matrix if a method treats
            all parameters alike. Rows are inputs: for kernels stored as (out, in), as in Equinox,
            pass ``matrices=memopt.out_in``.
        rest: updates the leaves that are not hidden matrices, instead of the method's default,
            which is the method itself or AdamW with the same learning rate and decay.
        weight_decay: decoupled decay, multiplied by the learning rate.
        weight_decay_mask: which leaves decay, as in ``optax.adamw``.
        state: how the state is stored, such as "int8", see `memopt.quantize_state`, which has more
            options; by default in float32.
    """

    matrices: Matrices
    rest: optax.GradientTransformation | None
    weight_decay: float
    weight_decay_mask: Any
    state: StateChoice


def finish(
    learning_rate: optax.ScalarOrSchedule,
    *steps: optax.GradientTransformation,
    others: optax.GradientTransformation | None = None,
    decayed: Decayed | None = None,
    is_flat: bool = False,
    matrices: Matrices = None,
    rest: optax.GradientTransformation | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    state: StateChoice = None,
) -> optax.GradientTransformationExtraArgs:
    """Appends decay and learning rate to a method's steps, and adds `rest` for other parameters.

    Args:
        learning_rate: a number or a schedule.
        *steps: map a matrix's gradient to the update to subtract.
        others: does so for leaves that are not hidden matrices, with float32 statistics, unless
            `rest` replaces it and its decay; None means `steps`.
        decayed: the term that decays after the learning rate, as in released code, see
            `decay_as_released`; None means that the weights decay before the learning rate.
        is_flat: whether decay and learning rate are in one chain with the steps or in a chain of
            their own. The structure of saved states depends on it.
        matrices: see `Common`.
        rest: see `Common`.
        weight_decay: see `Common`.
        weight_decay_mask: see `Common`.
        state: see `Common`.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = finish(0.5, optax.scale(2.0), weight_decay=0.5)
        >>> w = jnp.array(4.0)
        >>> float(tx.update(jnp.array(1.0), tx.init(w), w)[0])              # -0.5·(2·1 + 0.5·4)
        -2.0
    """
    decay, scale = (weight_decay, weight_decay_mask), optax.scale_by_learning_rate(learning_rate)
    if decayed is None:
        last = optax.add_decayed_weights(*decay), scale
    else:
        last = scale, decay_as_released(decayed, learning_rate, *decay, matrices=matrices)
    if rest is None and others is not None:
        rest = in_float32(optax.chain(others, *last))
    end = last if is_flat else (optax.chain(*last),)
    return store_state(matrices_and_rest(optax.chain(*steps, *end), rest, matrices), state)


def inner_or_adam(
    inner: optax.GradientTransformation | None, of: Callable[..., Any], **options: Any
) -> optax.GradientTransformation:
    """Returns the optimizer to run in a subspace: `inner`, or Adam if it is None.

    Args:
        inner: any Optax transformation, or None.
        of: the method.
        **options: the method's options for Adam.

    Raises:
        ValueError: if an option for Adam is given together with `inner`.
    """
    if inner is None:
        return optax.scale_by_adam(**options)
    check_unused(of, "inner runs in Adam's place", **options)
    return inner
