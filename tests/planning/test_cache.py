"""Records on disk: which program finds which, and what happens to damaged ones."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding

from memopt.planning import cache

RECORD = {"peak_bytes": 2**40, "temporaries": [["f32[8]", 32]]}


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "memopt" / "plan"


def lowered(f=jnp.sin, spec=None, **options):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, spec or jax.P())
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place)
    return jax.jit(f, **options).lower(x).as_text()


def test_what_is_saved_is_loaded():
    key = cache.key_of(lowered(), "cpu")
    assert cache.load(key) is None
    cache.save(key, RECORD)
    assert cache.load(cache.key_of(lowered(), "cpu")) == RECORD


def test_the_key_is_of_the_program_its_shardings_its_donations_and_its_options():
    keys = {
        cache.key_of(lowered(), "cpu"),
        cache.key_of(lowered(jnp.cos), "cpu"),
        cache.key_of(lowered(spec=jax.P("x")), "cpu"),
        cache.key_of(lowered(donate_argnums=0), "cpu"),
        cache.key_of(lowered(), "cpu", release=True),
    }
    assert len(keys) == 5


def test_the_key_is_of_chip_compiler_versions_and_flags(monkeypatch):
    program = lowered()
    keys = {cache.key_of(program, "cpu")}
    with monkeypatch.context() as patch:
        patch.setattr(cache, "compiler", lambda chip: "libtpu 1.0")
        keys |= {cache.key_of(program, "v5e"), cache.key_of(program, "v5p")}
    with monkeypatch.context() as patch:
        patch.setattr(cache, "compiler", lambda chip: "libtpu 1.1")
        keys |= {cache.key_of(program, "v5e")}
    with monkeypatch.context() as patch:
        patch.setattr(cache.importlib.metadata, "version", lambda package: "0.99")
        keys |= {cache.key_of(program, "cpu")}
    with monkeypatch.context() as patch:
        patch.setattr(cache.memopt, "__version__", "9.9")
        keys |= {cache.key_of(program, "cpu")}
    with monkeypatch.context() as patch:
        patch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
        keys |= {cache.key_of(program, "cpu")}
    assert len(keys) == 7


def test_the_key_is_of_the_files_that_name_the_scopes_of_a_step():
    package = Path(cache.memopt.__file__).parent
    scope = re.compile(r"named_scope\((UPDATE|WEIGHTS)\)|^(UPDATE|BLOCKS)\b.* = ", re.MULTILINE)
    naming = {path for path in package.rglob("*.py") if scope.search(path.read_text())}
    assert len(naming) == 3
    assert naming <= set(cache.sources())
    assert Path(cache.__file__) in cache.sources()


def test_the_key_is_of_their_content(monkeypatch, tmp_path):
    file = tmp_path / "step.py"
    monkeypatch.setattr(cache, "sources", lambda patterns: [file])
    keys = set()
    for content in ("a", "b"):
        file.write_text(content)
        keys.add(cache.key_of(lowered(), "cpu"))
    assert len(keys) == 2


def test_the_same_program_from_other_lines_has_the_same_key():
    """JAX keeps the traces of inner functions, whose lines are then those of their first caller."""
    f = lambda x: jnp.sin(x)
    g = lambda x: jnp.sin(x)
    assert cache.key_of(lowered(f), "cpu") == cache.key_of(lowered(g), "cpu")


def test_a_record_goes_when_a_source_that_it_names_changes(tmp_path):
    model = tmp_path / "model.py"
    model.write_text("x = 1\n")
    cache.save("a", RECORD, [str(model)])
    cache.save("b", RECORD)
    assert cache.load("a") == cache.load("b") == RECORD
    model.write_text("\nx = 1\n")
    assert cache.load("a") is None
    assert cache.load("b") == RECORD


@pytest.mark.parametrize("damage", ["half", "nothing", "number", "list", "text"])
def test_a_damaged_entry_is_a_warning_and_is_replaced(own_directory, damage):
    cache.save("a", RECORD)
    (path,) = own_directory.iterdir()
    whole = path.read_text()
    damaged = {
        "half": whole[: len(whole) // 2],
        "nothing": "",
        "number": whole.replace(str(2**40), "5"),
        "list": json.dumps([1]),
        "text": "\udcff" * 3,
    }
    path.write_bytes(damaged[damage].encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="is damaged and ignored"):
        assert cache.load("a") is None
    cache.save("a", RECORD)
    assert cache.load("a") == RECORD
    assert path.read_text() == whole


def test_a_directory_that_cannot_be_written_or_read_is_a_warning(own_directory):
    own_directory.parent.parent.mkdir(exist_ok=True)
    own_directory.parent.write_text("a file")
    with pytest.warns(UserWarning, match="cannot be written"):
        cache.save("a", RECORD)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert cache.load("a") is None


def test_a_relative_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for home in ("", "here"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert cache.directory() == tmp_path / ".cache" / "memopt" / "plan"


def test_several_may_write_at_once(own_directory):
    """A reader meets whole entries only."""
    with ThreadPoolExecutor(2) as pool:
        writes = [pool.submit(cache.save, "a", RECORD) for _ in range(200)]
        while not all(one.done() for one in writes):
            assert cache.load("a") in (None, RECORD)
    assert [one.result() for one in writes] == [None] * 200
    assert os.listdir(own_directory) == ["a.json"]
