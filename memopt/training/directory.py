"""The directory of a run: how it is chosen and written, so that no run overwrites another."""

import itertools
import json
import reprlib
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from memopt.training.config import Config
from memopt.training.lock import LOCK, Lock
from memopt.training.writing import why, write_whole

#: Options that may change when a run is resumed; all others decide what its checkpoints mean. The
#: content of `data` is checked apart from its place.
MAY_CHANGE = {
    *("data", "bad_records"),
    *("steps", "schedule", "phases", "mesh", "max_skipped", "keep"),
    *("eval_every", "eval_tokens", "checkpoint_every"),
}


def choose_directory(config: Config) -> Path:
    """Returns the directory of a run: a free one or, to resume, one that holds a run.

    Raises:
        ValueError: The directory is taken or, to resume, holds no run.

    Example:
        >>> from memopt.training.config import Config, Run
        >>> str(choose_directory(Config(run=Run(output=Path("runs/that/nobody/made")))))
        'runs/that/nobody/made'
    """
    output = config.run.output
    default = Path("runs", f"{config.architecture.model}-{config.optimization.optimizer}")
    if config.run.resume:
        runs = default.parent.glob(f"{default.name}*/config.json")
        latest = max(runs, key=lambda path: path.stat().st_mtime, default=default / "config.json")
        directory = output or latest.parent
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"there is no run to resume in {str(directory)!r}: give its directory with "
                "--output, or start it without --resume."
            )
        return directory
    if output:
        _check_free(output)
    numbered = (Path(f"{default}-{number}") for number in itertools.count(2))
    candidates = itertools.chain([default], numbered)
    return output or next(path for path in candidates if not _taken(path))


def open_directory(directory: Path, config: Config, lock: Lock) -> None:
    """Makes and locks the directory of a new run, and writes a run's `config.json` into it.

    Args:
        directory: The directory; of a run that is resumed it exists, and is locked already.
        config: The options to write.
        lock: The lock of the directory.

    Raises:
        ValueError: It cannot be written, or another run has been started in it.
    """
    try:
        if not config.run.resume:
            directory.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            _check_free(directory)
        content = json.dumps(config.flat(), indent=2) + "\n"
        write_whole(directory / "config.json", content.encode())
    except OSError as error:
        advice = "make room or repair it" if config.run.resume else "choose another --output"
        raise ValueError(
            f"output {str(directory)!r} cannot be written ({why(error)}): {advice}."
        ) from error


def check_same(
    directory: Path,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    *,
    may_change: Set[str] = frozenset(MAY_CHANGE),
) -> None:
    """Raises if options or data of a resumed run differ from those it was started with.

    Args:
        directory: The run's directory.
        there: Options, or what identifies the data, as the run has them.
        here: The same, as they are now.
        may_change: Those that may differ.

    Raises:
        ValueError: Anything differs that may not.
    """
    names = sorted((there.keys() | here.keys()) - may_change)
    differing = [
        f"{name} is {reprlib.repr(there.get(name))} there and {reprlib.repr(here.get(name))} here"
        for name in names
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise ValueError(
            f"the run in {str(directory)!r} cannot be resumed like this: {'; '.join(differing)}. "
            "Resume it as it was started, or start anew with another --output."
        )


def _check_free(output: Path) -> None:
    if _taken(output):
        raise ValueError(
            f"output {str(output)!r} is taken: continue the run in it with --resume, or choose "
            "another --output."
        )


def _taken(path: Path) -> bool:
    if not path.is_dir():
        return path.exists()
    return any(entry.name not in ("config.tmp", LOCK) for entry in path.iterdir())
