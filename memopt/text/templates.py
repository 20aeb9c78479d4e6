"""Chat templates: where a tokenizer has one, and a process that renders it within limits."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: For a tokenizer without a template: every turn is a document of its own, which no text can end.
PLAIN = """\
{% for message in messages %}
{{ eos_token }}{{ message['role'] }}
{{ message['content'] }}
{%- endfor %}
{{ eos_token }}{% if add_generation_prompt %}assistant
{% endif %}"""

#: What a template may use, for all renderings of one conversation: bytes of memory, of which Python
#: takes some 50 MiB; seconds of computing; and characters of its result, a million tokens or so.
MEMORY, SECONDS, CHARACTERS = 2**28, 10, 2**22

#: Bytes of JSON that a conversation may be: what is longer renders more than `CHARACTERS`, too.
QUESTION = 8 * CHARACTERS

#: Conversations on which a template may use up its limits before no other one is tried.
PATIENCE = 3

#: Characters that no text is given a meaning for, not even upper and lower case.
_PRIVATE = range(0xE000, 0xF900)


def unforgeable_mark() -> str:
    """Returns characters that a text holds by chance only: one of 2^100 strings.

    Example:
        >>> len(unforgeable_mark())
        8
    """
    return "".join(chr(secrets.choice(_PRIVATE)) for _ in range(8))


class Template:
    r"""A chat template in a process that can do nothing but render it; to be closed, or in `with`.

    Args:
        source: The template, in Jinja.
        variables: What it finds beside the messages, such as `eos_token`.
        name: What errors call it.

    Attributes:
        marks: What stands before and after the text of a `{% generation %}` block.

    Raises:
        UnusableTemplateError: It is no template, or uses too much in being compiled.
        ModuleNotFoundError: Jinja is not installed.

    Example:
        >>> with Template(PLAIN, {"eos_token": "</s>"}) as template:
        ...     template.render([{"messages": [{"role": "user", "content": "Hello"}]}])
        ['</s>user\nHello</s>']
    """

    def __init__(self, source: str, variables: Mapping[str, Any], name: str = "chat template"):
        import jinja2  # here, where its absence is told in a sentence

        del jinja2
        self.name, self.marks = name, (unforgeable_mark(), unforgeable_mark())
        limits = {"memory": MEMORY, "seconds": SECONDS, "characters": CHARACTERS}
        given = {"template": source, "variables": dict(variables), "marks": self.marks}
        self._first, self._patience = given | limits, PATIENCE
        self._start()

    def _start(self) -> None:
        program = Path(__file__).with_name("rendering.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the parent, which then closes this one
        )
        try:
            self._ask(self._first)
        except RenderError as error:
            self.close()
            raise UnusableTemplateError(f"{self.name} is no template: {error}.") from error
        except UnusableTemplateError:
            self.close()
            raise

    def render(self, conversations: Sequence[Mapping[str, Any]]) -> list[str]:
        """Renders the template once for each of these sets of variables.

        Args:
            conversations: `messages` and, optionally, `add_generation_prompt` and `tools`.

        Raises:
            RenderError: The template refuses one of them, or needs or renders too much.
            UnusableTemplateError: It has needed too much time for several; no other rendering
                follows.
        """
        try:
            return self._ask(list(conversations))
        except UnusableTemplateError as error:
            self._patience -= 1
            if not self._patience:
                raise
            self.close()
            self._start()
            raise RenderError(f"{error}".removesuffix(".")) from error

    def _ask(self, question: Any) -> list[str]:
        pipes: Any = self._process
        line = json.dumps(question).encode()
        if len(line) > QUESTION:
            raise RenderError(f"it is longer than {CHARACTERS:,} characters")
        try:
            pipes.stdin.write(line + b"\n")
            pipes.stdin.flush()
            reply = pipes.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if not reply:
            code = self._process.wait()
            why = f"its process has ended with exit code {code}"
            if code == -signal.SIGPROF:
                why = f"it computes for more than {SECONDS} seconds"
            raise UnusableTemplateError(f"{self.name} cannot be used: {why}.")
        answer = json.loads(reply)
        if "error" in answer:
            raise RenderError(answer["error"])
        return answer["texts"]

    def close(self) -> None:
        """Ends the process."""
        pipes: Any = self._process
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            pipes.stdin.close()
        pipes.stdout.close()

    def __enter__(self) -> "Template":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RenderError(ValueError):
    """A template refuses a conversation; says why, in the template's or Jinja's words."""


class UnusableTemplateError(ValueError):
    """A template refuses everything."""
