"""Renders one chat template, as a program of its own; imports nothing of memopt.

A template is a stranger's program, which may loop for hours or ask for a string of a terabyte. The
sandbox keeps it from the files and from Python; the kernel keeps this process from more memory and
time than the parent grants. `memopt.text.templates` starts it and talks to it in lines of JSON.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser, sandbox, utils

#: Templates that print a date print this one: the ids of a conversation are the same on every day.
#: It is what Llama 3's own template falls back on.
DAY = datetime.datetime(2024, 7, 26)


class Generation(ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`, around what the model is to learn."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> nodes.Node:
        """Calls `mark` with what the block renders."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        """Returns the text between the two marks."""
        marks: Any = self.environment.globals["_marks"]
        begin, end = marks
        return f"{begin}{caller()}{end}"


class Namespace(utils.Namespace):
    """Refuses attributes that begin with an underscore, as transformers does."""

    def __init__(*args: Any, **attributes: Any) -> None:  # `self` may be an attribute
        self, *rest = args
        attributes = dict(*rest, **attributes)
        for name in attributes:
            check_name(name)
        utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        utils.Namespace.__setitem__(self, name, value)


def check_name(name: object) -> None:
    """Raises unless a namespace may have an attribute of this name."""
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def compiled(source: str, variables: dict[str, Any], marks: list[str]) -> jinja2.Template:
    """Compiles a template as transformers does, in Jinja's immutable sandbox."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": DAY.strftime}
    environment.globals |= {"namespace": Namespace, "_marks": marks}
    return environment.from_string(source, globals=variables)


def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without the escapes that Jinja adds for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def refuse(message: object) -> None:
    """Ends a rendering with a sentence of the template's own."""
    raise jinja2.TemplateError(f"{message}")


def main() -> None:
    """Answers each line on standard input by one: a list of texts, or an error.

    The first line holds the template, its variables, the marks and the limits; each other one a
    list of more variables, to render the template with each of them.
    """
    start = json.loads(sys.stdin.readline())
    resource.setrlimit(resource.RLIMIT_AS, (start["memory"],) * 2)

    def answer(work: Callable[[], list[str]]) -> None:
        signal.setitimer(signal.ITIMER_PROF, start["seconds"])  # its signal ends the process
        try:
            texts = work()
            if (length := sum(map(len, texts))) > start["characters"]:
                raise ValueError(f"it renders {length:,} characters")
            reply = json.dumps({"texts": texts})
        except MemoryError:
            reply = json.dumps({"error": f"it needs more than {start['memory'] >> 20} MiB"})
        except Exception as error:  # whatever a template raises
            reply = json.dumps({"error": f"{error}" or type(error).__name__})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)

    @functools.cache
    def template() -> jinja2.Template:
        return compiled(start["template"], start["variables"], start["marks"])

    answer(lambda: [template().name or ""])
    for line in sys.stdin:
        answer(lambda: [template().render(**given) for given in json.loads(line)])  # noqa: B023


if __name__ == "__main__":
    main()
