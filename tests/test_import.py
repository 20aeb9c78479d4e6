"""Modules that `import memopt` does not import."""

import subprocess
import sys

import pytest

HEAVY = (
    *("jax.experimental.pallas", "jax._src.pallas", "jax.extend"),
    *("flax", "grain", "orbax", "tokenizers", "safetensors", "datasets", "tyro", "rich"),
    *("matplotlib", "tensorboardX", "keras"),
    *("memopt.cli", "memopt.models", "memopt.text", "memopt.training"),
)


def imported(statements: str) -> set[str]:
    program = f"{statements}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_memopt_imports_optax_and_itself():
    """Compared with Optax, whose own imports differ from release to release."""
    more = imported("import optax, memopt") - imported("import optax")
    assert "memopt.transforms.projectors" in more
    theirs = {
        name for name in more if name.split(".")[0] not in {"memopt", *sys.stdlib_module_names}
    }
    assert theirs == set()


def test_importing_memopt_imports_nothing_that_takes_long():
    names = imported("import memopt")
    assert "memopt" in names
    assert names.isdisjoint(HEAVY)


def test_training_steps_and_the_model_they_take_need_jax_and_optax_alone():
    steps = "train_step, release_step, init_state, evaluate, TrainState"
    model = "from memopt.models import StackedModel"
    names = imported(f"{model}; from memopt.training import {steps}")
    assert {"memopt.models", "memopt.training.release"} <= names
    assert names.isdisjoint({"flax", "orbax", "grain", "tyro", "tokenizers", "rich"})


WITHOUT_FLAX = """
import sys, jax.numpy as jnp, optax
from pathlib import Path
from memopt.models import StackedModel
from memopt.training import Checkpoints, init_state, release_step, train_step
model = StackedModel(
    embed=lambda rest, batch: batch["x"],
    block=lambda w, x, batch: x * w,
    head=lambda rest, x, batch: (x.sum(), 1),
)
options = {"tx": optax.sgd(0.5), "learning_rate": lambda step: 0.5}
state, batch = init_state({"blocks": jnp.ones((2, 1))}, optax.sgd(0.5)), {"x": jnp.ones(1)}
state, _ = train_step(state, batch, loss=model.loss, **options)
state, _ = release_step(state, batch, model=model, **options)
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(state, {"data": 7})
checkpoints.wait()
restored, record = checkpoints.restore(state)
checkpoints.close()
print(restored.params["blocks"].ravel().tolist(), record)
print(*sys.modules)
"""


def test_steps_and_checkpoints_of_a_model_without_flax_do_not_import_it(tmp_path):
    command = [sys.executable, "-c", WITHOUT_FLAX, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    printed, _, modules = done.stdout.strip().partition("\n")
    assert printed == "[0.25, 0.25] {'data': 7}", done.stderr
    assert "orbax" in modules.split()
    assert {"flax", "tyro", "grain", "tokenizers"}.isdisjoint(modules.split())


def test_what_training_does_not_have_is_an_attribute_error():
    import memopt.training

    assert {"Checkpoints", "release_step"} <= {*dir(memopt.training)}
    with pytest.raises(AttributeError, match=r"'memopt\.training' has no attribute 'trian_step'"):
        _ = memopt.training.trian_step
