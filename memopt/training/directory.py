"""The directory of a run: how it is chosen and written, so that no run overwrites another."""

import itertools
import json
import reprlib
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from memopt.json_files import read_json
from memopt.text.tokenizer import TEMPLATE
from memopt.text.tokenizer_files import tokenizer_files
from memopt.training.config import Config
from memopt.training.lock import LOCK, Lock
from memopt.training.writing import write_whole, writing

#: Options that may change when a run is resumed; all others decide what its checkpoints mean. The
#: contents of `data` and `tokenizer` are checked apart from their places.
MAY_CHANGE = {
    *("data", "mixture", "eval_data", "bad_records", "tokenizer", "chat_template"),
    *("steps", "schedule", "phases", "mesh", "max_skipped", "keep"),
    *("eval_every", "eval_tokens", "checkpoint_every", "log"),
}

#: Files that are there before `config.json` makes a directory that of a run.
BEFORE_CONFIG = {
    *(LOCK, "data.tmp", "data.jsonl", "config.tmp", "tokenizer", "tokenizer.tmp"),
    *(TEMPLATE, "chat_template.tmp"),
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
    optimizer = config.optimization.optimizer.replace(":", "-")  # of MODULE:FUNCTION
    default = Path("runs", f"{config.architecture.model}-{optimizer}")
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


def is_run(name: str, directory: Path) -> bool:
    """Whether a directory holds a run; otherwise it holds a Hugging Face model.

    Args:
        name: The option that names it.
        directory: The directory.

    Raises:
        ValueError: It holds neither.
    """
    if not directory.exists():
        advice = ""
        if len(directory.parts) == 2 and not directory.parent.exists():
            advice = (
                "; a model of the Hugging Face hub is downloaded first: "
                f"hf download {directory} --local-dir {directory.name}"
            )
        raise ValueError(f"{name}: there is no directory {str(directory)!r}{advice}.")
    try:
        keys = set(read_json(directory / "config.json"))
    except ValueError:
        keys = set()
    if not keys & {"optimizer", "model_type", "architectures"}:
        raise ValueError(
            f"{name} {str(directory)!r} is neither the directory of a run nor that of a Hugging "
            "Face model: each holds a config.json that says so."
        )
    return "optimizer" in keys


def kept_tokenizer(directory: Path, spec: str) -> str:
    """Returns what names the tokenizer of a run: its own copy, or `spec` if it has none.

    Args:
        directory: The directory of the run.
        spec: The tokenizer it was started with, as `load_tokenizer` takes it.
    """
    copy = directory / "tokenizer"
    return str(copy) if spec != "bytes" and (copy / "tokenizer.json").is_file() else spec


def keep_tokenizer(directory: Path, spec: str) -> None:
    """Copies the files of a tokenizer into the directory of a run, unless they are there.

    A process that is killed at any moment leaves no half copy.

    Args:
        directory: The directory of the run.
        spec: The tokenizer, as `load_tokenizer` takes it; bytes have no files.

    Raises:
        OSError: They cannot be read.
        WriteError: They cannot be written.
    """
    if spec == "bytes":
        return
    files = tokenizer_files(spec)
    copy, draft = directory / "tokenizer", directory / "tokenizer.tmp"
    with writing(f"output {str(directory)!r}"):
        if copy.is_dir() and {x.name: x.read_bytes() for x in copy.iterdir()} == files:
            return
        if draft.exists():
            shutil.rmtree(draft)  # left by a process that was killed
        (draft / "new").mkdir(parents=True)
        for name, content in files.items():
            (draft / "new" / name).write_bytes(content)
        if copy.exists():
            copy.rename(draft / "old")
        (draft / "new").rename(copy)
        shutil.rmtree(draft)


def lock_directory(directory: Path, lock: Lock, *, new: bool) -> None:
    """Locks the directory of a run, which it makes for a new one.

    Args:
        directory: The directory.
        lock: Its lock.
        new: Whether a run begins in it.

    Raises:
        ValueError: Another process trains the run, or another run has been started in it.
        WriteError: It cannot be written.
    """
    output = f"output {str(directory)!r}"
    with writing(output, "choose another --output") if new else writing(output):
        if new:
            directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if new:
            _check_free(directory)


def write_config(directory: Path, config: Config) -> None:
    """Writes a run's `config.json`.

    Raises:
        WriteError: It cannot be written.
    """
    _write(directory / "config.json", json.dumps(config.flat(), indent=2) + "\n")


def write_template(directory: Path, template: str) -> None:
    """Writes a run's chat template, which it keeps whatever becomes of its tokenizer's.

    Raises:
        WriteError: It cannot be written.
    """
    _write(directory / TEMPLATE, template)


def _write(path: Path, content: str) -> None:
    with writing(f"output {str(path.parent)!r}"):
        write_whole(path, content.encode())


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
    return any(entry.name not in BEFORE_CONFIG for entry in path.iterdir())
