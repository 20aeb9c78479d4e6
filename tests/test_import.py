"""Modules that `import memopt` does not import."""

import subprocess
import sys

HEAVY = (
    *("jax.experimental.pallas", "jax._src.pallas", "jax.extend"),
    *("flax", "grain", "orbax", "tokenizers", "safetensors", "datasets", "tyro", "rich"),
    *("matplotlib", "tensorboardX"),
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


def test_the_model_that_release_takes_is_public_and_needs_no_flax():
    names = imported("from memopt.models import StackedModel")
    assert "memopt.models" in names
    assert names.isdisjoint({"flax", "tyro", "grain", "tokenizers"})
