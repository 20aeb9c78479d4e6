"""A trace of some steps of a run, for XProf (TensorBoard) and Perfetto."""

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from rich.console import Console

from memopt.training.processes import is_main_process
from memopt.training.writing import why

#: Steps of a run before its profile: the first ones fill caches and allocate.
WARM_UP = 3


def check_profile(profile: int, left: int, *, resumed: bool = False) -> None:
    """Raises unless a run has as many steps left as are to be profiled; warns if it is resumed.

    Args:
        profile: The steps to profile.
        left: The steps that the run has left.
        resumed: Whether it is resumed, perhaps by the command that started it.

    Raises:
        ValueError: It has fewer, or `profile` is negative.

    Example:
        >>> check_profile(5, left=8)
        >>> check_profile(5, left=7)
        Traceback (most recent call last):
        ValueError: profile=5 needs 8 steps, of which 3 warm up, but the run has 7 left: ...
    """
    if profile < 0:
        raise ValueError(f"profile must be at least 0, got {profile}.")
    if profile and profile + WARM_UP > left:
        message = (
            f"profile={profile} needs {profile + WARM_UP} steps, of which {WARM_UP} warm up, but "
            f"the run has {left} left: lower --profile or raise --steps."
        )
        if not resumed:
            raise ValueError(message)
        if is_main_process():
            warnings.warn(message, stacklevel=2)


class Profile:
    """Traces some steps, after the first few; a trace that cannot be written is warned about.

    Args:
        directory: Where to write the trace.
        console: Where to say so.
        start: Steps taken before.
        steps: How many steps to trace; 0 for none.
    """

    def __init__(self, directory: Path, console: Console, start: int, steps: int):
        self._directory, self._console = directory, console
        self._steps = range(start + 1 + WARM_UP, start + 1 + WARM_UP + steps)
        self._tracing, self._next = False, start + 1
        self._before: set[Path] = set()

    def before(self, step: int, wait: Callable[[], object]) -> None:
        """Starts the trace before its first step, and ends it after its last.

        Args:
            step: The step to be taken next.
            wait: Waits until the one before is done.
        """
        self._next = step
        if (step in self._steps) == self._tracing:
            return
        wait()
        self.close()
        if step in self._steps:
            with self._warns():
                self._before = self._traces()
                self._directory.mkdir(exist_ok=True)
                jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
                self._tracing = True

    def close(self) -> None:
        """Writes the trace, if one was started and is not written yet.

        It has fewer steps than were asked for if the run ends before, as that of a controller may
        which takes steps of several batches.
        """
        if self._tracing:
            self._tracing = False
            with self._warns():
                jax.profiler.stop_trace()
                where = f"profile in {self._directory}"
                if self._next in self._steps[:-1]:
                    taken = self._next - self._steps.start + 1
                    where += f", of {taken} steps in place of {len(self._steps)}: the run has ended"
                self._console.print(where, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def _warns(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # RuntimeError: JAX's own
            self._steps = range(0)
            for half in self._traces() - self._before:  # frees its part of a full disk
                shutil.rmtree(half, ignore_errors=True)
            warnings.warn(f"the profile cannot be written ({why(error)}).", stacklevel=3)

    def _traces(self) -> set[Path]:
        return set(self._directory.glob("plugins/profile/*"))
