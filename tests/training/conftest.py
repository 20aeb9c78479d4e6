"""The preset "nano", its text, and compiled programs kept from test to test."""

import pytest

from tests.training import nano
from tests.training.compiled import kept_in


@pytest.fixture(autouse=True, scope="package")
def nano_preset():
    nano.install()
    yield
    nano.remove()


@pytest.fixture(autouse=True, scope="package")
def compilation_cache(tmp_path_factory):
    """Most of these tests compile the same few programs."""
    with kept_in(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of text."""
    return nano.write_text(tmp_path_factory.mktemp("text") / "words.txt")
