"""Checkpoints: written in the background, committed atomically, checked when they are read."""

import contextlib
import functools
import gc
import itertools
import json
import logging
import math
import os
import sys
import time
import warnings
import weakref
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from memopt.training.processes import is_main_process
from memopt.training.step import TrainState
from memopt.training.writing import WriteError, why
from memopt.trees import named_leaves

#: What is saved beside the arrays, JSON-serialisable.
Record = dict[str, Any]

#: Seconds between looks for a failure while a save is waited for.
SECONDS_BETWEEN_LOOKS = 0.5

#: Bytes of the smallest part of a replicated array that a device writes on its own. To cut it out,
#: Orbax compiles a program for each shape and device, which takes longer than writing 1 MiB.
MIN_PART_BYTES = 2**20


class Best(NamedTuple):
    """A checkpoint with the lowest validation loss."""

    val_loss: float
    step: int


class Checkpoints:
    """The checkpoints of one run, a directory each, named by step.

    Orbax writes them in the background and commits each with one rename, so a process killed at
    any moment leaves the checkpoints before it whole. A checksum of everything is stored with each;
    one that cannot be read, or reads differently from what was written, is skipped.

    Args:
        directory: Where they are; made if it does not exist.
        keep: How many of the newest to keep. The one with the lowest validation loss is kept too.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 3):
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._val_loss: dict[int, float | None] = {}
        self._saving: Any = None  # Orbax's response to the last save
        self._error: BaseException | None = None  # what has failed in it

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        for path in self._steps():
            self._val_loss[int(path.name)] = _metadata(path)["val_loss"]
        _WRITERS.add(self)
        logging.getLogger("absl").addFilter(_take_error)
        return ocp.training.Checkpointer(
            self._directory, preservation_policy=self, cleanup_tmp_directories=True
        )

    def save(self, state: TrainState, record: Record, val_loss: float | None = None) -> None:
        """Starts to save; returns as soon as `state` may be donated.

        Args:
            state: The state; its `step` names the checkpoint. Does nothing if that one exists.
            record: What belongs to it besides arrays.
            val_loss: Its validation loss, if known; the lowest finite one is the best.

        Raises:
            WriteError: This checkpoint, or the one before, cannot be written.
        """
        self.wait()
        step = int(state.step)
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = MIN_PART_BYTES
        with self._writing(), context:
            if any(checkpoint.step == step for checkpoint in self._checkpointer.checkpoints):
                return
            self._val_loss[step] = val_loss
            checksum = _checksum(state, record)
            metadata = {"record": record, "val_loss": val_loss, "checksum": checksum}
            metadata["params_checksum"] = int(_sum_of_leaves(state.params))
            self._saving = self._checkpointer.save_checkpointables_async(
                step, {"state": state}, force=True, custom_metadata=metadata
            )

    def check(self) -> None:
        """Raises if the last checkpoint is known to have failed.

        Raises:
            WriteError: It cannot be written.
        """
        if self._error:
            with self._writing():
                raise self._error

    def wait(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
            WriteError: It cannot be written.
        """
        while self._saving:
            self.check()
            began = time.monotonic()
            with self._writing():
                try:
                    self._saving.result(SECONDS_BETWEEN_LOOKS)
                    self._saving = None
                except TimeoutError:
                    if time.monotonic() - began < SECONDS_BETWEEN_LOOKS:
                        raise  # Orbax's own, of a barrier

    def newest(self) -> int | None:
        """The step of the newest checkpoint, whole or damaged; None if there is none."""
        return max((int(path.name) for path in self._steps()), default=None)

    def best(self) -> Best | None:
        """The newest checkpoint with the lowest validation loss; None if no loss is known."""
        found = [Best(_val_loss(path), int(path.name)) for path in self._steps()]
        best = min(found, key=lambda best: (best.val_loss, -best.step), default=None)
        return best if best and best.val_loss < math.inf else None

    def restore(
        self, like: TrainState, *, set_aside: bool = True
    ) -> tuple[TrainState, Record] | None:
        """Reads the newest checkpoint that is whole.

        Damaged ones after it are warned about and moved to `damaged/` beside the directory. One
        that is removed while it is read, by a run that goes on, is not damaged.

        Args:
            like: A state of the same shapes and dtypes, of arrays (such as the first state) or
                `ShapeDtypeStruct`s. The arrays are put where its shardings say: on another mesh
                than the one they were saved on, too. All must be on the same devices.
            set_aside: Whether to do so; otherwise they are left out, and nothing is written.

        Returns:
            The state and its record, or None if there is no checkpoint at all.

        Raises:
            ValueError: There are checkpoints, but none is whole and has the arrays of `like`; or
                `like` is not on the same devices throughout.
        """
        _check_one_place(like)
        found: tuple[TrainState, Record] | None = None
        failed: dict[Path, str] = {}
        with _quiet(failed):
            for path in sorted(self._steps(), key=lambda path: -int(path.name)):
                try:
                    metadata = _metadata(path)
                    found = found or _read(path, metadata, like)
                except Exception as error:  # Orbax raises errors of many kinds for a torn file
                    failed[path] = why(error)
        damaged = {path: reason for path, reason in failed.items() if path.exists()}
        if not found and len(damaged) < len(failed):
            return self.restore(like, set_aside=set_aside)  # newer ones are there
        if damaged and not found:
            path, reason = next(iter(damaged.items()))
            raise ValueError(
                f"no checkpoint in {self._directory} can be continued from (the newest, "
                f"{path.name}: {reason}); start anew with another --output."
            )
        for path, reason in damaged.items() if set_aside and is_main_process() else ():
            _set_aside(path, self._directory.parent / "damaged", reason)
        return found

    def read(
        self, step: str | int, like: TrainState, *, params_only: bool = False
    ) -> tuple[TrainState, float | None]:
        """Reads one checkpoint; writes nothing.

        Args:
            step: Which one: "last"; "best", with the lowest validation loss, or the last if none
                is known; or its step. A damaged one is left out with a warning, unless it is named.
            like: As of `restore`.
            params_only: Leave out the optimizer's state, which is not read and may be another.

        Returns:
            The state and its validation loss, None if it was not evaluated.

        Raises:
            ValueError: There is no such checkpoint, or none is whole and has the arrays of `like`;
                or `like` is not on the same devices throughout.
        """
        _check_one_place(like)
        paths = sorted(self._steps(), key=lambda path: -int(path.name))
        steps = [int(path.name) for path in paths]
        if not paths:
            raise ValueError(f"there is no checkpoint in {str(self._directory)!r} yet.")
        if step not in ("best", "last", *steps):
            raise ValueError(
                f"step must be best, last or one of {', '.join(map(str, sorted(steps)))}, which "
                f"are saved, got {step!r}."
            )
        if step not in ("best", "last"):
            paths = [path for path in paths if int(path.name) == step]
        found, failed = None, list[str]()
        with _quiet(failed):
            for path in sorted(paths, key=_val_loss) if step == "best" else paths:
                try:
                    metadata = _metadata(path)
                    state, _ = _read(path, metadata, like, params_only=params_only)
                except Exception as error:  # Orbax raises errors of many kinds for a torn file
                    failed.append(f"checkpoint {path.name}: {why(error)}")
                else:
                    found = state, metadata["val_loss"]
                    break
        if not found:
            raise ValueError(
                f"no checkpoint in {str(self._directory)!r} can be read ({failed[0]})."
            )
        for reason in failed:
            warnings.warn(f"{reason}: it is left out.", stacklevel=2)
        return found

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Says, as a preservation policy of Orbax, which checkpoints are kept."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        losses = [(self._val_loss[step], step) for step in steps]
        known = sorted((x, step) for x, step in losses if x is not None and math.isfinite(x))
        kept = {*steps[-self._keep :], *(step for _, step in known[:1])}
        return [step in kept for step in steps]

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            WriteError: The last checkpoint cannot be written.
        """
        if self._error or "_checkpointer" not in vars(self):
            return  # Orbax would wait for other processes, which may have ended
        try:
            self.wait()  # a failure that is logged meanwhile is still taken
            with self._writing():
                self._checkpointer.close()
        finally:
            _WRITERS.discard(self)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of Orbax, of many kinds, into one sentence; not those of other processes."""
        try:
            yield
        except Exception as error:
            cause = error.__cause__ if isinstance(error, TimeoutError) else error
            if isinstance(cause, jax.errors.JaxRuntimeError):
                raise cause from None
            raise WriteError(
                f"a checkpoint in {str(self._directory)!r} cannot be written ({why(error)}): make "
                "room, for which a smaller --keep helps, or repair the disk."
            ) from error

    def _steps(self) -> list[Path]:
        return [path for path in self._directory.glob("*") if path.name.isdecimal()]


#: Those that write.
_WRITERS: weakref.WeakSet[Checkpoints] = weakref.WeakSet()


def _take_error(record: logging.LogRecord) -> bool:
    """Gives each error in Orbax's log to the checkpoints whose directory it names.

    While there are any that write, no traceback of Orbax is shown.

    A process logs an error at once, but raises it only when all others have done their parts, for
    which it waits up to 20 minutes.
    """
    if not (record.exc_info and "orbax" in record.pathname):
        return True
    for writer in list(_WRITERS):
        if record.module == "async_checkpointer" and f"{writer._directory}/" in record.getMessage():
            writer._error = record.exc_info[1]
    return not _WRITERS


@contextlib.contextmanager
def _quiet(failed: Collection[Any]) -> Iterator[None]:
    """Silences what Orbax logs about a torn file, and the warnings of abandoned coroutines.

    Args:
        failed: Filled inside the context with files that could not be read. If there are any,
            the coroutines that Orbax abandoned are collected.
    """
    disabled, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
            if failed:
                gc.collect()  # takes up to a second
    finally:
        logging.disable(disabled)
        sys.unraisablehook = hook


def _metadata(path: Path) -> dict[str, Any]:
    """Returns what `save` stored beside the arrays; raises if any of it is missing."""
    metadata = ocp.checkpointables_metadata(path).custom_metadata or {}
    if not metadata.keys() >= {"record", "val_loss", "checksum"}:
        raise OSError("its record is missing, as after a kill while it was removed")
    return metadata


def _val_loss(path: Path) -> float:
    """The validation loss of a checkpoint, to sort by; infinite if it is not known."""
    try:
        loss = _metadata(path)["val_loss"]
    except Exception:  # of a torn file, which is then found out
        return math.inf
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _read(
    path: Path, metadata: dict[str, Any], like: TrainState, *, params_only: bool = False
) -> tuple[TrainState, Record]:
    arrays = ocp.checkpointables_metadata(path).metadata["state"]
    if arrays is None:
        raise OSError("the description of its arrays is missing")
    if params_only:  # beside whatever an optimizer of another version has kept
        _check_same_arrays({"params": arrays["params"]}, {"params": like.params})
        left_out = jax.tree.map(lambda _: ocp.PLACEHOLDER, arrays["opt_state"])
        like = like._replace(opt_state=left_out)
    else:
        _check_same_arrays(arrays, like)
    state = ocp.load_checkpointables(path, {"state": like})["state"]
    if params_only:
        there = metadata.get("params_checksum")  # release 0.1 has none
        is_same = there in (None, int(_sum_of_leaves(state.params)))
    else:
        is_same = metadata["checksum"] == _checksum(state, metadata["record"])
    if not is_same:
        raise OSError("the checksum does not agree with the content")
    return state, metadata["record"]


def _set_aside(path: Path, folder: Path, reason: str) -> None:
    folder.mkdir(exist_ok=True)
    numbered = (folder / f"{path.name}-{number}" for number in itertools.count(1))
    targets = itertools.chain([folder / path.name], numbered)
    target = path.rename(next(target for target in targets if not target.exists()))
    warnings.warn(
        f"checkpoint {path.name} is damaged and skipped, moved to {target} ({reason})", stacklevel=3
    )


def _check_one_place(like: TrainState) -> None:
    """Raises if arrays are on different devices, of which no checksum can be computed."""
    names: dict[frozenset[Any], str] = {}
    for name, leaf in named_leaves(like)[0]:
        if sharding := getattr(leaf, "sharding", None):
            names.setdefault(frozenset(sharding.device_set), name)
    if len(names) > 1:
        (some, first), (others, second), *_ = names.items()
        raise ValueError(
            f"like must have all arrays on the same devices, got {first!r} on {len(some)} and "
            f"{second!r} on {len(others)} of them: give all shardings of one mesh."
        )


def _check_same_arrays(saved: Any, like: Any) -> None:
    """Raises a sentence naming the first arrays that differ from those of the run."""
    there, here = _describe(saved), _describe(like)
    names = sorted(there.keys() | here.keys())
    pairs = [(name, there.get(name, "absent"), here.get(name, "absent")) for name in names]
    lines = [f"{name} is {a} in the checkpoint and {b} here" for name, a, b in pairs if a != b]
    if lines:
        raise ValueError("; ".join(lines[:3]) + (f"; and {len(lines) - 3} more" * (len(lines) > 3)))


def _describe(tree: Any) -> dict[str, str]:
    """Maps names of arrays to dtypes and shapes, of arrays or of what Orbax says of them."""

    def describe(leaf: Any) -> str:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)  # Orbax stores keys as such arrays
        return f"{leaf.dtype}{list(leaf.shape)}"

    return {name: describe(leaf) for name, leaf in named_leaves(tree)[0]}


def _checksum(state: TrainState, record: Record) -> int:
    dtypes = [str(leaf.dtype) for leaf in jax.tree.leaves(state)]
    text = json.dumps([record, dtypes], sort_keys=True)
    return int(_sum_of_leaves(state)) ^ zlib.crc32(text.encode())


@jax.jit
def _sum_of_leaves(tree: Any) -> jax.Array:
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        total = 31 * total + _sum_of_words(leaf)
    return total


def _sum_of_words(x: jax.Array) -> jax.Array:
    """Sums the words of an array, each times an odd number of its own, modulo 2^32.

    Exact in any order of summation, so the same however the array is sharded.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = (jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo)(x.dtype).bits
    words = jax.lax.bitcast_convert_type(x, f"uint{min(bits, 32)}").astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)
