"""Several processes that train together as one program, by `jax.distributed`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from memopt.training.config import Processes


def join(options: Processes) -> None:
    """Joins the other processes of this run, if there are any; before JAX is used for anything.

    Without options JAX finds them out by itself, on TPU pods and under Slurm, Open MPI and
    Kubernetes; elsewhere there are none.

    Args:
        options: Who the others are, and how long one may be silent.

    Raises:
        ValueError: Some options are missing or contradict each other, or JAX is in use already.
    """
    given = {
        "coordinator": options.coordinator,
        "processes": options.processes,
        "process": options.process,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"--coordinator, --processes and --process go together; --{missing[0]} is missing."
        )
    if not missing:
        _check(options)
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
            shutdown_timeout_seconds=options.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        if not missing:
            raise ValueError(f"the processes cannot be joined: {error}") from error


def is_first() -> bool:
    """Whether this is the process that shows progress and writes what is not a checkpoint."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def largest(number: int) -> int:
    """The largest of the processes' numbers, on each."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def of_first(array: np.ndarray) -> np.ndarray:
    """The first process's array, on each; its shape and dtype are the same everywhere."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def leave(reason: str) -> NoReturn:
    """Ends this process at once: to wait for one that is gone would take for ever."""
    print(f"memopt: process {jax.process_index()} ends: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _check(options: Processes) -> None:
    host, _, port = (options.coordinator or "").rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError(
            f"coordinator {options.coordinator!r} must be HOST:PORT, such as 10.0.0.1:1234."
        )
    count, index = options.processes or 0, options.process or 0
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"process={index} must be from 0 to {count - 1}, one less than processes={count}."
        )
