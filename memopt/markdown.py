"""Tables in Markdown."""

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: Collection[str] = ()
) -> str:
    """Returns a table in Markdown, columns of words aligned on the left, others on the right.

    Args:
      columns: the titles of the columns.
      rows: the cells of each row.
      words: the titles of columns of words, beside the first.

    Example:
      >>> print(markdown_table(["method", "loss"], [["adamw", "2.1"]]), end="")
      | method | loss |
      |---|--:|
      | adamw | 2.1 |
    """
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    left = {columns[0], *words}
    line = "".join("---|" if column in left else "--:|" for column in columns)
    return "\n".join([lines[0], f"|{line}", *lines[1:], ""])
