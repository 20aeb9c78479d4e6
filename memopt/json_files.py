"""JSON files of strangers: read with limits, refused in one sentence, and shown harmlessly."""

import json
import reprlib
from pathlib import Path
from typing import Any

# The indexes of the largest published models take a tenth of this.
MAX_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: The file, of at most `MAX_BYTES`.

    Returns:
        The object. NaN and infinity, which are no JSON, are refused rather than read.

    Raises:
        ValueError: If the file cannot be read, is too large, is not valid JSON or no object.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory, "sizes.json")
        ...     _ = path.write_text('{"width": 8}')
        ...     read_json(path)
        {'width': 8}

    """
    try:
        if not path.is_file():
            raise ValueError(f"{path} is not a file.")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{path} has {size} bytes; at most {MAX_BYTES} are read.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not valid JSON: it is not UTF-8.") from None
    try:
        content = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {str(error).split(';')[0]}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


def shown(value: Any) -> str:
    r"""Text for an error message: on one line, short, without control characters.

    Args:
        value: A name from a file, or any value of JSON.

    Example:
        >>> print(shown("model.norm.weight"), shown("\x1b[2J"), shown([1, "a"]))
        model.norm.weight '\x1b[2J' [1, 'a']

    """
    if isinstance(value, str) and value.isprintable() and len(value) <= 100:
        return value
    return reprlib.repr(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
