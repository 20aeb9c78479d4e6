"""The code of docs/libraries.md trains, saves, and resumes bit for bit."""

import re
from typing import Any

import chex
import jax
import pytest

import memopt
from tests.clients.optimizers import METHODS
from tests.clients.page import FOR_ANY, LIBRARIES, PAGE, by_column, model_of, run, table_row
from tests.clients.training import TOKENS

MODULES = {"Equinox": "equinox", "Haiku": "haiku", "Keras": "keras"}
OPTIMIZERS = run({}, FOR_ANY, "optimizers")["OPTIMIZERS"] | {
    # The page's 8-bit state leaves arrays as small as these in float32; this one does not.
    "codes": METHODS["adamw_8bit"](1e-2)
}

# Keras's own, in `Variable.numpy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
INTEGRATIONS = pytest.mark.integrations


def each_library(*quick: str) -> Any:
    """Every library of the page; those not in `quick` are tried with ``-m integrations`` alone."""
    marks = lambda library: [] if library in quick else [INTEGRATIONS]
    return pytest.mark.parametrize(
        "library", [pytest.param(name, marks=marks(name)) for name in LIBRARIES]
    )


optimizers = pytest.mark.parametrize(
    "optimizer",
    [pytest.param(name, marks=[INTEGRATIONS] if i else []) for i, name in enumerate(OPTIMIZERS)],
)


@pytest.fixture(autouse=True)
def keras_starts_anew(request, monkeypatch):
    """Counts layers from 0 and draws the same weights; afterwards it is on one device again."""
    library = request.node.callspec.params["library"]
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    module = pytest.importorskip(MODULES.get(library, "flax"))
    if library != "Keras":
        yield
        return
    module.utils.clear_session()
    module.utils.set_random_seed(0)
    yield
    module.distribution.set_distribution(None)


def parameters(library: str, names: dict[str, Any]) -> Any:
    """The parameters, as the optimizer gets them."""
    match library:
        case "Flax NNX":
            return names["nnx"].state(names["model"], names["nnx"].Param)
        case "Equinox":
            return names["eqx"].filter(names["model"], names["eqx"].is_array)
        case "Keras":
            return {v.path: v.value for v in names["model"].trainable_variables}
        case _:
            return names["state"].params if "state" in names else names["params"]


def arrays(library: str, names: dict[str, Any]) -> list[jax.Array]:
    """Parameters, and the optimizer's state after them."""
    match library:
        case "Flax NNX":
            state = names["nnx"].state(names["optimizer"])
        case "Flax linen":
            state = names["state"].opt_state
        case "Keras":
            state = [v.value for v in names["model"].optimizer.variables]
        case _:
            state = names["opt_state"]
    return jax.tree.leaves((parameters(library, names), state))


BATCHES = TOKENS.reshape(4, 2, -1)


@each_library("Flax linen")
@optimizers
def test_goes_on_from_a_file_as_if_it_had_not_stopped(library, optimizer, tmp_path):
    given = {"tx": OPTIMIZERS[optimizer], "directory": tmp_path}
    names = run(model_of(library, **given), library, "optimizer")
    start = jax.device_get(arrays(library, names))
    run(names, library, "train", "save", batches=BATCHES[:3])
    assert any((x != y).any() for x, y in zip(start, arrays(library, names), strict=True))
    run(names, library, "train", batches=BATCHES[3:])

    fresh = run(model_of(library, **given), library, "optimizer", "restore")
    run(fresh, library, "train", batches=BATCHES[3:])
    chex.assert_trees_all_equal(*(arrays(library, each) for each in (names, fresh)))


@each_library()
@optimizers
def test_parameters_and_state_are_split_on_a_mesh(library, optimizer):
    names = run({}, FOR_ANY, "optimizers") | {"tx": OPTIMIZERS[optimizer]}
    if library == "Keras":
        run(names, library, "distribution", "model", "optimizer")
    else:
        run(names, FOR_ANY, "mesh")
        run(names, library, "model", "place", "optimizer")
    run(names, library, "train", batches=TOKENS[None])
    split = [not x.sharding.is_fully_replicated for x in arrays(library, names)]
    count = len(jax.tree.leaves(parameters(library, names)))
    assert any(split[:count])
    assert any(split[count:])


@each_library("Flax NNX", "Flax linen")
def test_the_page_has_the_names_of_each_kind(library):
    names = model_of(library)
    found = by_column(memopt.describe(names["tx"], parameters(library, names)))
    assert all(re.search("/b(ias)?$", name) for name in found["biases"])
    assert table_row(library, found) in PAGE


@INTEGRATIONS
@pytest.mark.parametrize("library", ["Equinox"])
def test_rows_are_inputs_in_equinox_with_out_in(library):
    names = run(model_of(library), library, "out_in")
    rows = memopt.describe(names["tx"], parameters(library, names))
    assert rows["mlp/layers/0/weight"].axes == "rows 1, cols 0"
