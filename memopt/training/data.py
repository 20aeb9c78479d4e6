"""The data of a run: what it has been trained on, and what happens if that changes.

`data.jsonl` in the run's directory has a line for each data the run has been trained on: after
which step, the option `data`, what identifies it, and the names and digests of its files. By these
the same content is found again under other names.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memopt.text.finding import counted
from memopt.text.tokenizer import Tokenizer
from memopt.training.writing import write_whole, writing

#: Another reason for a difference, if the run has no history.
BEGUN_EARLIER = (
    "it was begun by an earlier version, which read .json, compressed files and byte order marks "
    "otherwise"
)


#: Part of the identity of examples that are all prompts with completions: no chat template is used.
COMPLETIONS = "data is_completions"


class Data(NamedTuple):
    """The data that a run was trained on from some step on.

    Attributes:
        after: The last step on other data, or 0.
        data: The option `data`.
        identity: What identifies the content, and its order.
        files: The listing of `memopt.text.files.Files.listing`.
    """

    after: int
    data: list[str]
    identity: dict[str, Any]
    files: list[list[Any]]


def read_history(directory: Path) -> list[Data]:
    """Reads what a run has been trained on, in order; nothing of a run of release 0.1."""
    path = directory / "data.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [Data(**json.loads(line)) for line in lines]


def begin_as_before(tokenizer: Tokenizer, history: Sequence[Data]) -> None:
    """Lets a tokenizer begin documents as those that a run was trained on.

    Args:
        tokenizer: The tokenizer of the run.
        history: What the run was trained on; earlier versions began all with `eos_id`.
    """
    if not any("data begin_ids" in entry.identity for entry in history):
        tokenizer.begin_ids = (tokenizer.eos_id,)


def write_history(directory: Path, history: Sequence[Data]) -> None:
    """Writes what a run has been trained on, in one go.

    Raises:
        WriteError: It cannot be written.
    """
    path = directory / "data.jsonl"
    lines = [json.dumps(entry._asdict()) + "\n" for entry in history]
    with writing(repr(str(path))):
        write_whole(path, "".join(lines).encode())


def continue_history(
    directory: Path, history: Sequence[Data], there: Mapping[str, Any], here: Data, *, accept: bool
) -> tuple[list[Data], bool]:
    """Decides whether a run goes on where it was in its data.

    Args:
        directory: The run's directory.
        history: What it was trained on so far.
        there: The identity of the data at its last checkpoint.
        here: The data now, after the step of that checkpoint.
        accept: Whether other data is accepted.

    Returns:
        The history from now on, and whether the data is that of the checkpoint.

    Raises:
        ValueError: It is not, and was not accepted.
    """
    # Release 0.1 knew less about its data.
    differing = [name for name, value in there.items() if here.identity.get(name) != value]
    last = history[-1] if history else here._replace(after=here.after if differing else 0)
    if differing and not accept and (not history or last.identity != here.identity):
        unknown = f"{', '.join(differing)}, or {BEGUN_EARLIER}"
        change = describe_change(last.files, here.files) if history else unknown
        raise ValueError(
            f"the data of the run in {str(directory)!r} has changed: {change}. Resume it with the "
            "data it had, from whatever place, or add --accept-data-change: then training goes on "
            "with a new pass over the data as it is now."
        )
    if not history:
        return [last], not differing
    used = [history[0], *(entry for entry in history[1:] if entry.after < here.after)]
    return (used if used[-1].identity == here.identity else [*used, here]), not differing


def describe_change(before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> str:
    """Says in which files two listings differ.

    Example:
        >>> before = [["a.txt", 5, None, "0a"], ["b.txt", 5, None, "0b"]]
        >>> describe_change(before, [["a.txt", 6, None, "0c"], ["d.txt", 5, None, "0d"]])
        '1 changed (a.txt), 1 new (d.txt), 1 gone (b.txt)'
    """
    old, new = ({name: content for name, *content in files} for files in (before, now))
    kinds = {
        "changed": [name for name in new if name in old and new[name] != old[name]],
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
    }
    parts = [counted(names, kind) for kind, names in kinds.items() if names]
    return ", ".join(parts) or "other records of the same files"
