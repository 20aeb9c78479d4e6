"""The processes of a run: how they find each other, and which of them writes.

`jax.distributed` does the rest. All run the same program on the same global
arrays; files are written, and the screen, by the first alone.
"""

import contextlib
import json
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from memopt.errors import check_at_least
from memopt.internals import clusters

if TYPE_CHECKING:  # else checkpoints, which need no options, would need tyro
    from memopt.training.config import Run

#: The processes agree on signals about so often, and after so many steps at the latest.
SECONDS_TO_STOP, STEPS_TO_STOP = 1.0, 16
#: Bytes of an error that other processes are told; a sentence with two paths has less.
LONGEST_MESSAGE = 2000


def init_distributed(options: "Run") -> None:
    """Starts `jax.distributed`, if there is more than one process; before any use of a device.

    Args:
        options: `coordinator`, `processes` and `process`, all three or none: then Slurm, Open MPI
            or a TPU pod decide, and elsewhere the process is alone. `heartbeat_timeout`, seconds.

    Raises:
        ValueError: Some of the three are missing, are impossible or contradict the cluster.

    Example:
        >>> from memopt.training.config import Run
        >>> init_distributed(Run())  # a laptop
        >>> init_distributed(Run(processes=2))
        Traceback (most recent call last):
        ValueError: coordinator, processes and process go together, got None, 2 and None: ...
    """
    check_at_least("heartbeat_timeout", options.heartbeat_timeout, 1)
    given = (options.coordinator, options.processes, options.process)
    if given != (None, None, None):
        _check_given(*given)
    count, index = options.processes or 1, options.process or 0
    if cluster := next((cluster for cluster in clusters() if cluster.is_env_present()), None):
        count, index = cluster.get_process_count(), cluster.get_process_id()
        if given[0] and given[1:] != (count, index):
            raise ValueError(
                f"processes={options.processes} and process={options.process} contradict the "
                f"cluster ({cluster.name}), where this is process {index} of {count}: leave them "
                "and --coordinator out, or give the same."
            )
    if count > 1:
        jax.distributed.initialize(
            *given,
            cluster_detection_method=None if cluster else "deactivate",
            heartbeat_timeout_seconds=options.heartbeat_timeout,
            shutdown_timeout_seconds=options.heartbeat_timeout,
        )


def _check_given(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            "coordinator, processes and process go together, "
            f"got {coordinator}, {processes} and {process}: give all three or none."
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"coordinator {coordinator!r} must be HOST:PORT, such as node0:1234.")
    check_at_least("processes", processes, 1)
    if not 0 <= process < processes:
        raise ValueError(f"process={process} must be from 0 to processes - 1, {processes - 1}.")


def is_main_process() -> bool:
    """Whether this process is the one that writes files and shows how the run goes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def errors_in_all_processes() -> Iterator[None]:
    """Raises an error that one process meets in the block in all of them; each waits for all.

    Raises:
        Exception: The error of this process, as it is.
        ValueError: The error of another one, with its number.

    Example:
        >>> with errors_in_all_processes():
        ...     raise ValueError("data 'a.txt' cannot be read.")
        Traceback (most recent call last):
        ValueError: data 'a.txt' cannot be read.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    message = (f"{own}" or type(own).__name__).encode()[:LONGEST_MESSAGE] if own else b""
    padded = np.frombuffer(message.ljust(LONGEST_MESSAGE, b"\0"), np.uint8)
    everywhere = multihost_utils.process_allgather(padded)
    if own:
        raise own
    for process, theirs in enumerate(everywhere):
        if text := theirs.tobytes().rstrip(b"\0").decode(errors="replace"):
            raise ValueError(f"{text} (process {process} of {len(everywhere)})")


def check_same_on_all_processes(options: Mapping[str, Any]) -> None:
    """Raises unless all processes were started alike; none goes on before all have asked.

    Args:
        options: JSON-serialisable values, of the same names everywhere.

    Raises:
        ValueError: Something differs; names it.

    Example:
        >>> check_same_on_all_processes({"seed": 0})
    """
    digests = [zlib.crc32(json.dumps(value).encode()) for value in options.values()]
    everywhere = multihost_utils.process_allgather(np.array(digests, np.uint32))
    differing = np.array(list(options))[(everywhere != everywhere[0]).any(axis=0)]
    if differing.size:
        raise ValueError(
            f"{', '.join(differing)} must be the same in all {len(everywhere)} processes, but "
            "differs: start them with the same options and data."
        )


def broadcast(value: Any) -> Any:
    """Returns the value of process 0 in all processes; each waits for it.

    Args:
        value: JSON-serialisable; of process 0, those of others do not matter.

    Example:
        >>> broadcast({"batches": 2})
        {'batches': 2}
    """
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode()
    bits = int(multihost_utils.broadcast_one_to_all(np.int32(len(text).bit_length())))
    # Of all the same shape, of which there are few: each is compiled once.
    padded = np.frombuffer(text[: 1 << bits].ljust(1 << bits), np.uint8)
    return json.loads(np.uint8(multihost_utils.broadcast_one_to_all(padded)).tobytes())


class StopAgreement:
    """Lets all processes stop after the same step when one of them has caught a signal.

    They gather their signals before a step, and then again after about a second, at most 16 steps
    later: gathering waits for the step before. One process alone has nothing to gather. JAX's own
    `reached_preemption_sync_point` hears of SIGTERM only, and replaces its handler.
    """

    def __init__(self) -> None:
        self._steps = self._left = 1
        self._gathered = time.perf_counter()

    def __call__(self, signal: int) -> int:
        """Returns a signal that a process has caught, or 0, the same in all; for each step.

        Args:
            signal: The signal that this process has caught, or 0.

        Example:
            >>> StopAgreement()(0)
            0
        """
        if jax.process_count() == 1:
            return signal
        self._left -= 1
        if self._left:
            return 0
        now = time.perf_counter()
        mine = np.array([signal, (now - self._gathered) / self._steps], np.float32)
        found, seconds = multihost_utils.process_allgather(mine).max(axis=0)
        self._gathered = now
        self._steps = self._left = min(max(int(SECONDS_TO_STOP / seconds), 1), STEPS_TO_STOP)
        return int(found)
