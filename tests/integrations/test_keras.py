"""An Optax transformation in Keras updates as Optax does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memopt
from memopt.integrations import keras_optimizer

# Keras's own, in `Variable.numpy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
integrations = pytest.mark.integrations


@pytest.fixture
def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    return pytest.importorskip("keras")


KERNEL, BIAS = "dense/kernel", "dense/bias"
PARAMS = {KERNEL: jnp.arange(12.0).reshape(3, 4), BIAS: jnp.ones(4)}


def variables(keras):
    with keras.name_scope("dense"):
        made = [keras.Variable(x, name=path.removeprefix("dense/")) for path, x in PARAMS.items()]
    assert [v.path for v in made] == [KERNEL, BIAS]
    return made


def gradients(step):
    keys = jax.random.split(jax.random.key(step))
    return [jax.random.normal(keys[0], (3, 4)), jax.random.normal(keys[1], (4,))]


def optax_steps(tx, steps):
    """The parameters after steps of Optax, from these lists of gradients."""
    params, state = PARAMS, tx.init(PARAMS)
    for kernel, bias in steps:
        updates, state = tx.update({KERNEL: kernel, BIAS: bias}, state, params)
        params = optax.apply_updates(params, updates)
    return [params[KERNEL], params[BIAS]]


@integrations
def test_updates_are_those_of_optax(keras):
    made = variables(keras)
    tx = memopt.galore(1e-2, rank=2, matrices=memopt.every_matrix)
    optimizer = keras_optimizer(tx)
    for step in range(3):
        optimizer.apply(gradients(step), made)
    found = [v.value for v in made]
    for x, y in zip(found, optax_steps(tx, map(gradients, range(3))), strict=True):
        np.testing.assert_array_equal(x, y)
    assert int(optimizer.iterations.value) == 3


@integrations
def test_the_rate_of_keras_multiplies_that_of_optax(keras):
    made = variables(keras)
    optimizer = keras_optimizer(optax.sgd(0.5), learning_rate=0.5)
    optimizer.apply(gradients(0), made)
    optimizer.learning_rate = 2.0
    optimizer.apply(gradients(1), made)
    expected = optax_steps(optax.sgd(0.25), [gradients(0)])
    for x, y, g in zip([v.value for v in made], expected, gradients(1), strict=True):
        np.testing.assert_allclose(x, y - g, rtol=1e-6)


@integrations
def test_keras_accumulates_and_clips_before_the_transformation(keras):
    made = variables(keras)
    optimizer = keras_optimizer(optax.adam(0.1), global_clipnorm=0.1, gradient_accumulation_steps=2)
    for step in range(4):
        optimizer.apply(gradients(step), made)
    means = [
        [(x + y) / 2 for x, y in zip(gradients(i), gradients(i + 1), strict=True)] for i in (0, 2)
    ]
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
    for x, y in zip([v.value for v in made], optax_steps(tx, means), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


@integrations
def test_state_that_is_the_parameters_is_donated_on_its_own(keras):
    """`fit` donates parameters and state, and an array can be donated once."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    stay = optax.GradientTransformation(lambda p: p, lambda g, s, p: (optax.tree.sub(s, p), s))
    model.compile(optimizer=keras_optimizer(optax.chain(optax.sgd(0.1), stay)), loss="mse")
    start = model.get_weights()
    model.fit(np.ones((8, 3)), np.ones((8, 4)), epochs=2, verbose=0)
    for x, y in zip(model.get_weights(), start, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@integrations
def test_state_is_saved_in_the_order_of_the_variables(keras):
    """Layers of the same model are called dense_9 and dense_10, or dense and dense_1."""

    def shapes(*names):
        made = [keras.Variable(jnp.ones(2 + i), name=name) for i, name in enumerate(names)]
        optimizer = keras_optimizer(optax.adam(0.1))
        optimizer.build(made)
        optimizer.apply([v.value for v in made], made)
        return [v.shape for v in optimizer.variables]

    assert shapes("dense_9", "dense_10") == shapes("dense", "dense_1")


@integrations
def test_a_loaded_model_goes_on_in_the_same_random_subspaces(keras, tmp_path):
    tx = memopt.apollo(1e-2, rank=1, matrices=memopt.every_matrix)
    x, y = (np.random.default_rng(0).normal(size=(8, n)).astype("float32") for n in (3, 4))

    def fitted(model, epochs):
        model.fit(x, y, epochs=epochs, batch_size=8, shuffle=False, verbose=0)
        return [v.numpy() for v in model.trainable_variables]

    def make():
        keras.utils.set_random_seed(0)
        layers = keras.layers.Dense(5, name="up"), keras.layers.Dense(4, name="down")
        model = keras.Sequential([*layers])  # named in the paths, as it has no shapes yet
        model.compile(optimizer=keras_optimizer(tx), loss="mse")
        return model

    whole, model = fitted(make(), 4), make()
    fitted(model, 2)
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    model.compile(optimizer=keras_optimizer(tx), loss="mse")
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "model.keras")
    for found, expected in zip(fitted(model, 2), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


@integrations
def test_a_file_is_not_loaded_without_its_transformation(keras, tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    model.compile(optimizer=keras_optimizer(optax.sgd(0.1)), loss="mse")
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="load it with compile=False"):
        keras.saving.load_model(tmp_path / "model.keras")


@integrations
@pytest.mark.parametrize(("codec", "dtype"), [("int4", "int4"), ("float8", "float8_e4m3fn")])
def test_state_that_keras_cannot_save_is_refused_before_training(keras, codec, dtype):
    made = variables(keras)
    tx = memopt.quantize_state(optax.scale_by_adam(), codec, min_size=0)
    with pytest.raises(ValueError, match=rf"keeps 'codes_mu_dense_\w+' in {dtype}, which Keras"):
        keras_optimizer(tx).build(made)


@integrations
def test_two_variables_of_one_path_are_refused(keras):
    made = variables(keras)
    with pytest.raises(ValueError, match="two have 'dense/bias': name the layers"):
        keras_optimizer(optax.sgd(0.1)).build([*made, variables(keras)[1]])


@integrations
@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_missing_gradient_is_refused(keras):
    made = variables(keras)
    with pytest.raises(ValueError, match=r"got none for \['dense/bias'\]"):
        keras_optimizer(optax.sgd(0.1)).apply([gradients(0)[0], None], made)


@integrations
def test_another_backend_is_refused(keras, monkeypatch):
    from memopt.integrations import keras as module

    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ValueError, match="its backend is 'torch'; set KERAS_BACKEND=jax"):
        module._optimizer_class.__wrapped__()


def test_decay_outside_of_the_transformation_is_refused():
    with pytest.raises(ValueError, match="weight_decay must be an option of tx"):
        keras_optimizer(optax.sgd(0.1), weight_decay=0.1)


def test_a_rate_in_place_of_a_transformation_is_refused():
    with pytest.raises(ValueError, match=r"tx must be an Optax transformation, .*got 0\.001"):
        keras_optimizer(1e-3)
