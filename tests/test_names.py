"""Public names."""

import importlib
import inspect
import pkgutil
import types

import optax
import optax.contrib
import pytest

import memopt

MODULES = [
    importlib.import_module(f"memopt.{found.name}")
    for room in ("state", "transforms")
    for found in pkgutil.walk_packages(
        importlib.import_module(f"memopt.{room}").__path__, prefix=f"{room}."
    )
]


def test_every_class_of_state_is_exported():
    states = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if inspect.isclass(value) and name.endswith("State") and value.__module__ == module.__name__
    }
    assert len(states) > 5
    assert states <= set(dir(memopt))


@pytest.mark.parametrize("library", [optax, optax.contrib], ids=["optax", "contrib"])
def test_only_methods_have_a_name_that_optax_has(library):
    """And both then begin with the learning rate."""
    public = {
        name
        for name, value in vars(memopt).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    same = public & set(dir(library))
    # It takes any preconditioner, of which Optax's is the identity; and SCALE is a method's name.
    same -= {"scale_by_polyak", "scale"}
    assert same <= set(memopt.available("memopt"))
    for name in same:
        for module in (memopt, library):
            assert next(iter(inspect.signature(getattr(module, name)).parameters)) == (
                "learning_rate"
            )
