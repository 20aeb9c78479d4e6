"""Files with a JSON value on each line, which a killed process may have left torn."""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, effect: str = "") -> list[Any]:
    """Reads a file with a JSON value on each line; leaves out lines that are not whole.

    The last line may be cut short, by a kill or a full disk. Any other is warned about.

    Args:
        path: The file; if there is none, it has no lines.
        effect: The effect of a line that is left out, for the warning.

    Example:
        >>> read_json_lines(Path("missing.jsonl"))
        []

    """
    if not path.exists():
        return []
    values = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        try:
            if line.endswith("\n"):
                values.append(json.loads(line))
        except ValueError:
            rest = f"; {effect}." if effect else "."
            warnings.warn(
                f"{str(path)!r}: line {number} is damaged and left out{rest}", stacklevel=2
            )
    return values


def finite(value: Any) -> Any:
    """Returns a value of JSON with None in place of numbers that are not finite.

    Example:
        >>> finite({"loss": float("nan"), "losses": (2.0, float("inf"))})
        {'loss': None, 'losses': [2.0, None]}

    """
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
