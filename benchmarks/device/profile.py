"""Finds the kernels in which a program spends its time."""

import collections
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


def longest_kernels(run: Callable[[], Any], count: int = 5) -> list[dict[str, Any]]:
    """Returns the kernels that take the most time.

    Args:
        run: runs the program once and waits for it; it must have run before.
        count: the number of kernels.

    Returns:
        Records: the kernel's name, its instruction of HLO, how often it ran, and its milliseconds
        and share of all kernels' time.

    Raises:
        RuntimeError: if the profiler recorded no kernel.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (file,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        taken: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
        for event in _kernels(data):
            operation = str(dict(event.stats).get("hlo_op", ""))
            taken[event.name, operation].append(event.duration_ns / 1e6)
    if not taken:
        raise RuntimeError("the profiler saw no kernel.")
    total = sum(map(sum, taken.values()))
    longest = sorted(taken.items(), key=lambda item: -sum(item[1]))[:count]
    return [
        {
            "kernel": name[:100],
            "operation": operation,
            "calls": len(each),
            "milliseconds": sum(each),
            "share": sum(each) / total,
        }
        for (name, operation), each in longest
    ]


def _kernels(data: Any) -> Iterator[Any]:
    """Yields the kernels on GPUs' streams; without a GPU, XLA's instructions on the CPU."""
    planes = list(data.planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or planes:
        for line in plane.lines:
            for event in line.events:
                on_stream = gpus and line.name.startswith("Stream")
                if on_stream or (not gpus and "hlo_op" in dict(event.stats)):
                    yield event
