"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown, the first column on the left, the others on the right.

    Args:
      columns: the titles of the columns.
      rows: the cells of each row.

    Example:
      >>> print(markdown_table(["method", "loss"], [["adamw", "2.1"]]), end="")
      | method | loss |
      |---|--:|
      | adamw | 2.1 |
    """
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], f"|---|{'--:|' * (len(columns) - 1)}", *lines[1:], ""])
