"""The preset "nano", its text, and compiled programs kept from test to test."""

import jax
import pytest

from tests.training import nano


@pytest.fixture(autouse=True, scope="package")
def nano_preset():
    nano.install()
    yield
    nano.remove()


@pytest.fixture(autouse=True, scope="package")
def compilation_cache(tmp_path_factory):
    """Most of these tests compile the same few programs."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of text."""
    return nano.write_text(tmp_path_factory.mktemp("text") / "words.txt")
