"""An Optax transformation as an optimizer of Keras."""

import functools
import posixpath
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from memopt.state.sharding import init_sharded
from memopt.trees import leaf_name


def keras_optimizer(
    tx: optax.GradientTransformation, learning_rate: Any = 1.0, **options: Any
) -> Any:
    """Makes a Keras optimizer of an Optax transformation, for Keras on JAX.

    The transformation gets the trainable variables in a dict by their paths, such as
    ``"dense_1/kernel"``, without the name of a model around all of them. Its state is stored in
    variables of the optimizer: Keras saves them with the model, and with a ``keras.distribution``
    they are sharded by `memopt.state_sharding`.

    ```python
    model.compile(optimizer=memopt.integrations.keras_optimizer(tx), loss=loss)
    model.fit(x, y)
    model.save("model.keras")
    ```

    The file contains the state, but not the functions of `tx`. To continue from it:

    ```python
    model = keras.saving.load_model("model.keras", compile=False)
    model.compile(optimizer=memopt.integrations.keras_optimizer(tx), loss=loss)
    model.optimizer.build(model.trainable_variables)
    model.load_weights("model.keras")  # weights and state
    ```

    Args:
        tx: any Optax transformation whose update needs only gradients and parameters.
        learning_rate: a float or a Keras schedule that multiplies the updates of `tx`, which has
            its own learning rate. Callbacks that change the optimizer's learning rate change it.
        **options: other options of ``keras.optimizers.Optimizer``, such as ``global_clipnorm``,
            ``gradient_accumulation_steps``, ``use_ema`` and ``name``; not ``weight_decay``, which
            is an option of `tx`.

    Returns:
        A ``keras.optimizers.Optimizer``.

    Raises:
        ImportError: if Keras is not installed.
        ValueError: if `tx` is no Optax transformation, Keras has another backend than JAX, or
            `weight_decay` is given; when the optimizer is built, if two variables have the same
            path, or if Keras cannot save an array of the state (4-bit integers and float8); in an
            update, if a variable has no gradient.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(
            f"tx must be an Optax transformation, such as memopt.apollo_mini(1e-2), got {tx!r}."
        )
    if options.get("weight_decay") is not None:
        raise ValueError(
            "weight_decay must be an option of tx, such as memopt.apollo_mini(1e-2, "
            f"weight_decay={options['weight_decay']}): Keras would not multiply it by tx's rate."
        )
    return _optimizer_class()(tx, learning_rate, **options)


@functools.cache
def _optimizer_class() -> Any:
    import keras

    if keras.backend.backend() != "jax":
        raise ValueError(
            f"keras_optimizer needs Keras on JAX, and its backend is {keras.backend.backend()!r}; "
            "set KERAS_BACKEND=jax before Keras is imported."
        )

    @keras.saving.register_keras_serializable("memopt")
    class OptaxOptimizer(keras.optimizers.Optimizer):
        """See `keras_optimizer`."""

        def __init__(self, tx: Any, learning_rate: Any, **options: Any):
            super().__init__(learning_rate, **options)
            self.tx = tx

        def build(self, variables: Any) -> None:
            super().build(variables)
            updated = [v for v in variables if not _is_overwritten(v)]
            self._names = _names([v.path for v in updated])
            params = self._by_name(updated)
            on_mesh = all(isinstance(x.sharding, NamedSharding) for x in params.values())
            state = init_sharded(self.tx, params) if on_mesh else self.tx.init(params)
            leaves, self._structure = jax.tree_util.tree_flatten_with_path(state)
            # Files have the order of the variables, which names lose: dense_10 is before dense_9.
            rank = {name: i for i, name in enumerate(params)}
            places = [[rank.get(getattr(key, "key", ""), -1) for key in path] for path, _ in leaves]
            in_order = sorted(range(len(leaves)), key=lambda i: (places[i], i))
            made = {i: self._add(*leaves[i]) for i in in_order}
            self._state = [made[i] for i in range(len(leaves))]

        def _by_name(self, variables: Any) -> dict[str, jax.Array]:
            return {self._names[v.path]: v.value for v in variables}

        def _add(self, path: Any, value: jax.Array) -> Any:
            name = leaf_name(path).replace("/", "_")
            # Keras writes NumPy's own dtypes and bfloat16.
            if value.dtype != jnp.bfloat16 and getattr(value.dtype, "isbuiltin", 0) != 1:
                raise ValueError(
                    f"tx keeps {name!r} in {value.dtype}, which Keras cannot save; it can save "
                    '"int8" and "bfloat16" of memopt.quantize_state.'
                )
            layout = value.sharding if isinstance(value.sharding, NamedSharding) else None
            variable = self.add_variable(value.shape, dtype=value.dtype, layout=layout, name=name)
            variable.assign(jnp.array(value))  # a copy: Keras donates every variable
            return variable

        # The only step of Keras that has all gradients, once they are accumulated and clipped.
        def _backend_update_step(
            self, grads: Any, trainable_variables: Any, learning_rate: Any
        ) -> None:
            missing = self._names.keys() - {v.path for v in trainable_variables}
            if missing:
                raise ValueError(
                    "grads must have one gradient for each variable, got none for "
                    f"{sorted(missing)}."
                )
            params = self._by_name(trainable_variables)
            state = jax.tree.unflatten(self._structure, [v.value for v in self._state])
            gradients = dict(zip(params, grads, strict=True))
            updates, state = self.tx.update(gradients, state, params)
            rate = jnp.asarray(learning_rate)
            updates = jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)
            new = optax.apply_updates(params, updates)
            for variable in trainable_variables:
                self.assign(variable, new[self._names[variable.path]])
            for variable, value in zip(self._state, jax.tree.leaves(state), strict=True):
                self.assign(variable, value)

        @classmethod
        def from_config(cls, config: Any, custom_objects: Any = None) -> Any:
            """Refuses: a file does not have the transformation."""
            raise ValueError(
                "the file of a model does not have the functions of its Optax transformation: "
                "load it with compile=False, compile it with memopt.integrations.keras_optimizer, "
                "call model.optimizer.build(model.trainable_variables), and load_weights(the file)."
            )

    return OptaxOptimizer


def _names(paths: Sequence[str]) -> dict[str, str]:
    """Names of variables by their paths, without the leading parts that all paths share.

    The name of a model is in front of its layers' until it is saved and loaded; random subspaces
    are drawn by names, and must stay the same.

    Example:
        >>> _names(["sequential/dense/kernel", "sequential/dense/bias"])
        {'sequential/dense/kernel': 'dense/kernel', 'sequential/dense/bias': 'dense/bias'}
    """
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(
            f"variables must have different paths, two have {twice!r}: name the layers."
        )
    layers = [path.rpartition("/")[0].rpartition("/")[0] for path in paths]
    around = posixpath.commonpath(layers) if layers else ""
    return {path: path.removeprefix(around).removeprefix("/") for path in paths}


def _is_overwritten(variable: Any) -> bool:
    """Whether Keras puts the gradient in the variable's place, as for scales of float8."""
    return getattr(variable, "overwrite_with_gradient", False)
