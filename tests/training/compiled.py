"""Compiled programs kept in a directory, for tests that compile the same ones."""

import contextlib

import jax


@contextlib.contextmanager
def kept_in(directory):
    """Writes all that is compiled to a directory, and reads from there what was compiled before."""
    options = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
