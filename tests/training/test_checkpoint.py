"""Checkpoints: what is kept, that reading gives what was written, and that damage is seen."""

import contextlib
import logging
import math
import os
import shutil
import time
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.errors import JaxRuntimeError
from orbax.checkpoint import v1 as ocp

from memopt.training import checkpoint
from memopt.training.checkpoint import Checkpoints, _checksum
from memopt.training.step import init_state
from memopt.training.writing import WriteError
from tests.training.disks import files_of_at_most

TX = optax.chain(optax.adam(1e-3), optax.add_noise(0.1, 0.9, jax.random.key(7)))


def make_state(step, tx=TX, dtype=jnp.float32):
    params = {
        "kernel": jnp.full((40, 60), step / 7, dtype),
        "blocks": {"half": jnp.arange(6, dtype=jnp.bfloat16) * step, "none": None},
        "flags": jnp.array([True, False]),
        "byte": jnp.arange(5, dtype=jnp.int8),
    }
    return init_state(params, tx)._replace(step=jnp.int32(step))


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def record(step):
    return {"data": {"next": step, "name": "text"}}


def write(directory, steps, keep=3, losses=None):
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(make_state(step), record(step), (losses or {}).get(step))
    checkpoints.close()


def read(directory, like=None):
    return Checkpoints(directory).restore(abstract(make_state(0)) if like is None else like)


def kept(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def test_reading_gives_what_was_written(tmp_path, monkeypatch):
    write(tmp_path / "checkpoints", [3, 5])
    monkeypatch.delattr("gc.collect")  # takes long, and only a torn file leaves what to collect
    state, saved = read(tmp_path / "checkpoints")
    chex.assert_trees_all_equal(state, make_state(5))
    chex.assert_trees_all_equal_dtypes(state, make_state(5))
    assert saved == record(5)


def test_an_empty_directory_has_nothing_to_read(tmp_path):
    assert read(tmp_path / "checkpoints") is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 4: 2.0, 5: 1.5}
    write(tmp_path, range(1, 8), keep=2, losses=losses)
    assert kept(tmp_path) == [2, 6, 7]
    write(tmp_path, [8], keep=2, losses={8: 0.5})  # after a restart
    assert kept(tmp_path) == [7, 8]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    write(tmp_path, [1])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write(tmp_path, [1])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_what_is_saved_is_the_state_at_the_call_also_when_it_is_donated(tmp_path):
    """The step writes into the buffers while they are still being written out."""
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    tx = optax.sgd(0.1)
    state = init_state({"kernel": jnp.full((500, 4000), 3.0)}, tx)
    like, expected = abstract(state), jax.tree.map(jnp.copy, state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    for _ in range(20):
        state = overwrite(state)
    checkpoints.close()
    restored, _ = Checkpoints(tmp_path).restore(like)
    chex.assert_trees_all_equal(restored, expected)


def test_a_state_saved_on_one_mesh_is_read_onto_another(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    state = init_state({"kernel": jnp.arange(64.0).reshape(16, 4)}, optax.sgd(0.1))
    split = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    split = split._replace(params=jax.device_put(state.params, rows))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(split, {})
    checkpoints.close()
    columns = jax.NamedSharding(jax.make_mesh((4, 2), ("a", "b")), jax.P(None, "a"))
    everywhere = jax.NamedSharding(columns.mesh, jax.P())
    like = abstract(state, everywhere)._replace(params=abstract(state.params, columns))
    restored, _ = Checkpoints(tmp_path).restore(like)
    assert restored.params["kernel"].sharding == columns
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))


def test_small_replicated_arrays_are_saved_without_being_cut(tmp_path, monkeypatch):
    """Orbax would compile a program for each shape and device."""
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    state = jax.device_put(init_state({"kernel": jnp.ones((16, 4))}, optax.sgd(0.1)), everywhere)
    monkeypatch.delattr(jax.lax, "slice_in_dim")
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state, {})
    restored, _ = Checkpoints(tmp_path).restore(abstract(state))
    chex.assert_trees_all_equal(restored, state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    write(directory / "checkpoints", [1, 2, 3], losses={1: 3.0, 2: 2.0, 3: 1.0})
    return directory


def damage(file, how):
    size = file.stat().st_size
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        os.truncate(file, size // 2)
    elif size:
        content = bytearray(file.read_bytes())
        content[size // 2] ^= 4
        file.write_bytes(content)


@pytest.mark.parametrize(
    "how", ["flip", *(pytest.param(how, marks=pytest.mark.slow) for how in ("delete", "truncate"))]
)
@pytest.mark.filterwarnings("ignore:checkpoint . is damaged:UserWarning")
def test_any_file_of_the_newest_may_be_damaged(tmp_path, whole, how):
    """The state read is the one written, to it or to the one before; and saving goes on."""
    read_steps = []
    files = [file for file in sorted((whole / "checkpoints" / "3").rglob("*")) if file.is_file()]
    for number, file in enumerate(files[::2] if how == "flip" else files):
        run = tmp_path / str(number)
        shutil.copytree(whole, run)
        damage(run / file.relative_to(whole), how)
        state, saved = read(run / "checkpoints")
        step = int(state.step)
        assert step in (2, 3)
        assert saved == record(step)
        chex.assert_trees_all_equal(state, make_state(step))
        if step == 2:
            assert (run / "damaged" / "3").is_dir()
            assert kept(run / "checkpoints") == [1, 2]
        if step not in read_steps:  # once after each
            write(run / "checkpoints", [3, 4], keep=2)
            assert int(read(run / "checkpoints")[0].step) == 4
        read_steps.append(step)
    assert read_steps.count(2) >= 3


def test_skipping_warns_and_loses_nothing(tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in (2, 3):
        (run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").unlink()
    (run / "damaged" / "3").mkdir(parents=True)
    with pytest.warns(UserWarning, match="damaged") as caught:
        state, _ = read(run / "checkpoints")
    assert int(state.step) == 1
    assert sorted(str(w.message).split()[1] for w in caught) == ["2", "3"]
    assert kept(run / "checkpoints") == [1]
    assert (run / "damaged" / "3-1" / "state").is_dir()
    assert (run / "damaged" / "2" / "state").is_dir()


@pytest.mark.parametrize("set_aside", [True, False])
def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_damaged(
    tmp_path, whole, monkeypatch, set_aside
):
    """Another run prunes it, which has written newer ones by then."""
    run, newer = tmp_path / "run", tmp_path / "4"
    shutil.copytree(whole, run)
    write(newer, [4])
    read_whole = checkpoint._read

    def read_late(path, *arguments):
        if newer.exists():
            for step in (1, 2, 3):
                shutil.rmtree(run / "checkpoints" / str(step))
            (newer / "4").rename(run / "checkpoints" / "4")
            newer.rmdir()
        return read_whole(path, *arguments)

    monkeypatch.setattr(checkpoint, "_read", read_late)
    checkpoints = Checkpoints(run / "checkpoints")
    state, saved = checkpoints.restore(abstract(make_state(0)), set_aside=set_aside)
    assert (int(state.step), saved) == (4, record(4))
    assert not (run / "damaged").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of TensorStore
def test_a_checkpoint_that_cannot_be_written_is_noticed_without_a_wait(tmp_path, capfd):

    def look():
        while True:
            checkpoints.check()

    checkpoints, after = Checkpoints(tmp_path), make_state(2)
    checkpoints.save(make_state(1), record(1))
    checkpoints.wait()
    with files_of_at_most(1000):
        checkpoints.save(after, record(2))
        with pytest.raises(WriteError, match=r"cannot be written \(File too large\): make room"):
            look()
    with pytest.raises(WriteError):
        checkpoints.save(after, record(2))
    checkpoints.close()
    assert checkpoints.newest() == 1
    assert not capfd.readouterr().err
    write(tmp_path, [3])
    assert kept(tmp_path) == [1, 3]  # nothing is left of the one that failed


def test_a_process_does_not_wait_for_others_with_an_error_of_its_own(tmp_path, monkeypatch):
    """They wait for it, and it for them, until a barrier's time is up."""

    class Barrier:
        def result(self, timeout):
            time.sleep(timeout)
            error = (OSError, OSError(28, "No space left on device"), None)
            path, message = "orbax/async_checkpointer.py", f"Failed, directory: {tmp_path}/16"
            record = logging.LogRecord("absl", logging.ERROR, path, 1, message, (), error)
            logging.getLogger("absl").handle(record)
            raise TimeoutError

    monkeypatch.setattr(checkpoint, "SECONDS_BETWEEN_LOOKS", 0.01)
    other, checkpoints = Checkpoints(tmp_path / "other"), Checkpoints(tmp_path)
    assert other._checkpointer
    assert checkpoints._checkpointer
    checkpoints._saving = Barrier()
    with pytest.raises(WriteError, match="No space left on device"):
        checkpoints.wait()
    checkpoints.close()
    other.wait()
    other.close()


def fail_with(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("raises", [JaxRuntimeError("reset"), TimeoutError("barrier")])
def test_that_another_process_is_gone_is_no_failure_to_write(tmp_path, raises):
    checkpoints = Checkpoints(tmp_path)
    raises.__cause__ = JaxRuntimeError("reset") if isinstance(raises, TimeoutError) else None
    checkpoints._saving = SimpleNamespace(result=fail_with(raises))
    with pytest.raises(JaxRuntimeError, match="reset"):
        checkpoints.wait()


def test_when_none_can_be_read_nothing_is_moved(tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in (1, 2, 3):
        shutil.rmtree(run / "checkpoints" / str(step) / "state")
    with pytest.raises(ValueError, match="no checkpoint in"):
        read(run / "checkpoints")
    assert kept(run / "checkpoints") == [1, 2, 3]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (make_state(0, optax.sgd(0.1)), "opt_state"),
        (make_state(0, dtype=jnp.bfloat16), "params/kernel is float32"),
    ],
)
def test_another_tree_is_refused_by_name_and_not_called_damage(whole, other, named):
    with pytest.raises(ValueError, match=named):
        read(whole / "checkpoints", abstract(other))
    assert kept(whole / "checkpoints") == [1, 2, 3]


def test_the_checksum_depends_on_the_order_of_numbers_and_on_where_they_are():
    state = make_state(1)
    w = jnp.arange(12.0).reshape(3, 4)
    sums = [
        _checksum(state._replace(params=params), record(1))
        for params in (
            {"a": w, "b": w + 1},
            {"a": w + 1, "b": w},
            {"a": w[::-1], "b": w + 1},
            {"a": w[:, ::-1], "b": w + 1},
            {"a": w.at[0, 0].set(1e-30), "b": w + 1},
        )
    ]
    sums.append(_checksum(state._replace(params={"a": w, "b": w + 1}), record(2)))
    assert len(set(sums)) == len(sums)


def test_of_losses_that_are_not_finite_none_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints._val_loss = {4: math.nan, 8: 2.0, 12: None, 16: 3.0}
    steps = [SimpleNamespace(step=step) for step in (4, 8, 12, 16)]
    assert checkpoints.should_preserve(steps, context=None) == [False, True, False, True]


def test_where_nothing_was_saved_closing_does_not_start_orbax(tmp_path, monkeypatch):
    """Its start waits for all processes, of which others may have ended."""
    monkeypatch.setattr(ocp.training, "Checkpointer", None)
    Checkpoints(tmp_path).close()


LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluated")
    write(directory, range(1, 6), keep=5, losses=LOSSES)
    return directory


def test_the_best_is_known_with_its_loss(evaluated, tmp_path):
    assert Checkpoints(evaluated).best() == (LOSSES[2], 2)
    write(tmp_path, [1])
    assert Checkpoints(tmp_path).best() is None


@pytest.mark.parametrize(("step", "expected"), [("best", 2), ("last", 5), (3, 3)])
def test_one_checkpoint_is_read_by_its_step_or_its_loss(evaluated, step, expected):
    state, val_loss = Checkpoints(evaluated).read(step, abstract(make_state(0)))
    chex.assert_trees_all_equal(state, make_state(expected))
    assert val_loss == LOSSES.get(expected)


def test_the_best_is_the_last_where_none_was_evaluated(tmp_path):
    write(tmp_path, [1, 2])
    state, val_loss = Checkpoints(tmp_path).read("best", abstract(make_state(0)))
    assert (int(state.step), val_loss) == (2, None)


def test_the_params_are_read_beside_another_state_of_the_optimizer(evaluated):
    other = optax.chain(optax.sgd(1e-3, momentum=0.9), optax.ema(0.9))
    state, _ = Checkpoints(evaluated).read(3, abstract(make_state(0, other)), params_only=True)
    chex.assert_trees_all_equal(state.params, make_state(3).params)
    half = abstract(make_state(0, other, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"params/kernel is float32\[40, 60\] in the checkpoint"):
        Checkpoints(evaluated).read(3, half, params_only=True)


def test_parameters_are_read_without_the_state_of_the_optimizer(evaluated):
    state, _ = Checkpoints(evaluated).read(3, abstract(make_state(0)), params_only=True)
    chex.assert_trees_all_equal(state.params, make_state(3).params)
    assert all(leaf is ... for leaf in jax.tree.leaves(state.opt_state))
    assert len(jax.tree.leaves(state.opt_state)) > 0


def test_a_damaged_checkpoint_is_left_out_unless_it_is_named(evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "copy")
    for path in (tmp_path / "copy" / "2").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    checkpoints, like = Checkpoints(tmp_path / "copy"), abstract(make_state(0))
    with pytest.warns(UserWarning, match="checkpoint 2: .*: it is left out"):
        state, _ = checkpoints.read("best", like, params_only=True)
    assert int(state.step) == 3
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read \(checkpoint 2: "):
        checkpoints.read(2, like, params_only=True)
    assert kept(tmp_path / "copy") == [1, 2, 3, 4, 5]


def test_changed_parameters_are_noticed_also_without_the_state(evaluated, monkeypatch):
    load = ocp.load_checkpointables
    monkeypatch.setattr(ocp, "load_checkpointables", lambda *arguments: _negate(load(*arguments)))
    with pytest.raises(ValueError, match="checksum does not agree"):
        Checkpoints(evaluated).read(3, abstract(make_state(0)), params_only=True)


def _negate(loaded):
    params = loaded["state"].params | {"byte": -loaded["state"].params["byte"]}
    return {"state": loaded["state"]._replace(params=params)}


@pytest.mark.parametrize(
    ("step", "says"),
    [(7, "one of 1, 2, 3, 4, 5, which are saved, got 7"), ("worst", "got 'worst'")],
)
def test_a_step_that_is_not_saved_is_refused(evaluated, step, says):
    with pytest.raises(ValueError, match=says):
        Checkpoints(evaluated).read(step, abstract(make_state(0)))


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"there is no checkpoint in .* yet"):
        Checkpoints(tmp_path).read("best", abstract(make_state(0)))


def test_a_state_on_different_devices_is_refused_by_the_names_of_arrays(tmp_path):
    state = init_state({"kernel": jnp.ones((16, 4))}, optax.sgd(0.1))
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state, {})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = abstract(state, one)._replace(params=abstract(state.params, everywhere))
    for read in (Checkpoints(tmp_path).restore, lambda like: Checkpoints(tmp_path).read(1, like)):
        with pytest.raises(ValueError, match=r"^like must have all arrays on the same"):
            read(like)
