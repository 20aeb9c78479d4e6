"""One method for the matrices, another for the rest; and how both end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from memopt.errors import check_unused
from memopt.matrices import Matrices, map_matrices
from memopt.parameters import reading_whole_trees
from memopt.state.precision import in_float32
from memopt.transforms.decay import Decayed, decay_as_released


def matrices_and_rest(
    method: optax.GradientTransformation,
    rest: optax.GradientTransformation | None,
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    """Partitions a tree: `method` for its hidden matrices, `rest` for everything else.

    Args:
      method: what updates the matrices.
      rest: what updates embeddings, output head, norms and biases; None is `method` too.
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


class Ending(NamedTuple):
    """The arguments that every method has, and that `finish` looks at.

    Attributes:
      learning_rate: a number or a schedule.
      weight_decay: decoupled decay, times the learning rate.
      weight_decay_mask: which leaves decay, as in ``optax.adamw``.
      matrices: which leaves are hidden matrices, see `memopt.hidden_matrices`.
      rest: updates the leaves that are none, instead of the method's default.
    """

    learning_rate: optax.ScalarOrSchedule
    weight_decay: float = 0.0
    weight_decay_mask: Any = None
    matrices: Matrices = None
    rest: optax.GradientTransformation | None = None


def descend(
    ending: Ending, decayed: Decayed | None = None
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Decay and learning rate, the last two steps of a chain.

    Args:
      ending: the method's arguments.
      decayed: as in `finish`.
    """
    rate, decay = ending.learning_rate, (ending.weight_decay, ending.weight_decay_mask)
    scale = optax.scale_by_learning_rate(rate)
    if decayed is None:
        return optax.add_decayed_weights(*decay), scale
    return scale, decay_as_released(decayed, rate, *decay, matrices=ending.matrices)


def finish(
    ending: Ending,
    *steps: optax.GradientTransformation,
    others: optax.GradientTransformation | None = None,
    decayed: Decayed | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Ends a method: decay and learning rate after its steps, and `rest` for other parameters.

    Args:
      ending: the method's arguments.
      *steps: make a matrix's gradient the update that is to be subtracted.
      others: does so for leaves that are no hidden matrices, with float32 statistics, unless
        `ending.rest` replaces it and its decay; None: the steps do.
      decayed: decays after the learning rate, as in released code, see `decay_as_released`; None:
        the weights decay before it.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = finish(Ending(0.5, weight_decay=0.5), optax.scale(2.0))
      >>> w = jnp.array(4.0)
      >>> float(tx.update(jnp.array(1.0), tx.init(w), w)[0])              # -0.5·(2·1 + 0.5·4)
      -2.0
    """
    last = descend(ending, decayed)
    rest = ending.rest
    if rest is None and others is not None:
        rest = in_float32(optax.chain(others, *last))
    return matrices_and_rest(optax.chain(*steps, optax.chain(*last)), rest, ending.matrices)


def inner_or_adam(
    inner: optax.GradientTransformation | None, of: Callable[..., Any], **options: Any
) -> optax.GradientTransformation:
    """Returns what runs in a subspace: `inner`, or else Adam.

    Args:
      inner: any Optax transformation, or None.
      of: the method.
      **options: of the method that Adam takes.

    Raises:
      ValueError: if an option of Adam's is given beside `inner`.
    """
    if inner is None:
        return optax.scale_by_adam(**options)
    check_unused(of, "inner runs in Adam's place", **options)
    return inner
