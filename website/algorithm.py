"""Sets the algorithm boxes of docstrings as mathematics.

A docstring has its box in plain text, which `help` shows as it is::

    N = Adam(Q_Lᵀ G Q_R)
    W ← W − lr · (Q_L N Q_Rᵀ + weight_decay · W)      every step

Here it becomes a table of MathML, which browsers draw without a script or a font of ours. What
follows an equation after two or more spaces is a remark; a first word that ends with a colon is a
label. In an equation, ``/`` makes a fraction of its two neighbours, ``_`` a subscript of the next
symbol or parenthesis and ``^`` a superscript; words of several letters stand upright.
"""

import re
import textwrap
import unicodedata
from collections.abc import Iterator
from html import escape

SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₖₜᵢⱼ", "0123456789+−ktij", strict=True))
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵗᵀᵏ", "0123456789+−t⊤k", strict=True))
ACCENTS = {"\u0302": "^", "\u0303": "~", "\u0304": "¯"}
FENCES = {"(": ")", "[": "]", "⌊": "⌋", "⟨": "⟩", "‖": "‖", "|": "|"}
OPERATORS = "←=~≤≥<>≈≫≪·×∘±+−-,;:∈…"

TOKEN = re.compile(
    rf"(?P<space> +)|(?P<quoted>`[^`]+`|\"[^\"]+\")|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)"
    rf"|(?P<word>[A-Za-z]{{2,}}(?:_[A-Za-z]+)*)"
    rf"|(?P<sub>[{''.join(SUBSCRIPTS)}]+)|(?P<super>[{''.join(SUPERSCRIPTS)}]+)"
    rf"|(?P<accent>[{''.join(ACCENTS)}])|(?P<other>.)"
)


class _Equation:
    """Reads an equation token by token."""

    def __init__(self, text: str) -> None:
        text = unicodedata.normalize("NFD", text)
        self.tokens = [(str(m.lastgroup), m[0]) for m in TOKEN.finditer(text)]
        self.at = 0

    def peek(self, kind: str = "other", values: str = "") -> bool:
        """Whether the next token is of a kind, and one of these characters."""
        if self.at == len(self.tokens):
            return False
        found, value = self.tokens[self.at]
        return found == kind and (not values or value in values)

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][1]

    def skip_space(self) -> bool:
        spaced = self.peek("space")
        self.at += spaced
        return spaced

    def row(self, until: str = "") -> str:
        """Everything up to a closing fence, or to the end."""
        parts: list[str] = []
        joined, was_word = False, False  # whether a factor is before, and whether it is a word
        while self.at < len(self.tokens):
            spaced = self.skip_space()
            if until and self.peek(values=until):
                break
            if self.peek(values=OPERATORS):
                parts.append(_operator(self.take()))
                joined = False
                continue
            if self.at == len(self.tokens):
                break
            is_word = self.peek("word") or self.peek("quoted")
            if joined and (spaced or is_word):
                width = "0.3em" if is_word or was_word else "0.17em"
                parts.append(f'<mspace width="{width}"></mspace>')
            parts.append(self.fraction())
            joined, was_word = True, is_word
        return "".join(parts)

    def fraction(self) -> str:
        """A factor, or one over another."""
        top, bare = self.factor()
        before = self.at
        self.skip_space()
        if not self.peek(values="/"):
            self.at = before
            return top
        self.take()
        self.skip_space()
        return f"<mfrac>{_row(bare)}{_row(self.factor()[1])}</mfrac>"

    def factor(self) -> tuple[str, str]:
        """A symbol with what is attached to it; and the same without parentheses around it."""
        if self.peek(values="√"):
            self.take()
            root = f"<msqrt>{self.factor()[1]}</msqrt>"
            return root, root
        if self.peek(values="∇"):
            gradient = f"<mo>{self.take()}</mo>"
            self.skip_space()
            gradient += self.factor()[0]
            return gradient, gradient
        called = self.peek("word") or self.tokens[self.at][1].isalpha()
        base = bare = self.symbol()
        if base.startswith("<mrow><mo"):
            bare = re.sub(r"^<mrow><mo[^>]*>\(</mo>(.*)<mo[^>]*>\)</mo></mrow>$", r"\1", base)
        base, attached = self.scripts(base)
        if called and self.peek(values="("):
            base, attached = self.scripts(_row(base + self.symbol()))[0], True
        return base, base if attached else bare

    def scripts(self, base: str) -> tuple[str, bool]:
        """Adds subscripts, superscripts and primes."""
        below = above = ""
        while True:
            if self.peek("sub"):
                below += "".join(_symbol(SUBSCRIPTS[c]) for c in self.take())
            elif self.peek("super"):
                above += "".join(_symbol(SUPERSCRIPTS[c]) for c in self.take())
            elif self.peek(values="'"):
                self.take()
                above += "<mo>′</mo>"
            elif self.peek(values="_"):
                self.take()
                below += self.unfenced()
            elif self.peek(values="^"):
                self.take()
                sign = (
                    f"<mo>{self.take().replace('-', '−')}</mo>" if self.peek(values="±−-") else ""
                )
                above += sign + self.unfenced()
            else:
                break
        if below and above:
            return f"<msubsup>{base}{_row(below)}{_row(above)}</msubsup>", True
        if below or above:
            tag = "msub" if below else "msup"
            return f"<{tag}>{base}{_row(below or above)}</{tag}>", True
        return base, False

    def unfenced(self) -> str:
        symbol = self.symbol()
        return re.sub(r"^<mrow><mo[^>]*>\(</mo>(.*)<mo[^>]*>\)</mo></mrow>$", r"\1", symbol)

    def symbol(self) -> str:
        """A letter, a word, a number or a parenthesis with its contents."""
        kind, value = self.tokens[self.at]
        self.at += 1
        if kind == "other" and value in FENCES:
            inside = self.row(FENCES[value])
            closing = self.take() if self.at < len(self.tokens) else ""
            fence = lambda sign: f"<mo>{sign}</mo>"
            return f"<mrow>{fence(value)}{inside}{fence(closing)}</mrow>"
        if kind == "quoted":
            return f'<mtext class="code">{escape(value.strip("`"))}</mtext>'
        made = _symbol(value)
        while self.peek("accent"):
            made = f'<mover accent="true">{made}<mo>{ACCENTS[self.take()]}</mo></mover>'
        return made


def _symbol(value: str) -> str:
    if value[0].isdigit() or value in "½¼∞":
        return f"<mn>{value}</mn>"
    if len(value) > 1:
        return f"<mtext>{escape(value)}</mtext>"
    return f"<mi>{value}</mi>" if value.isalpha() else f"<mo>{escape(value)}</mo>"


def _operator(sign: str) -> str:
    return f"<mo>{escape(sign.replace('-', '−'))}</mo>"


def _row(content: str) -> str:
    return f"<mrow>{content}</mrow>"


def math(text: str) -> str:
    """Returns MathML for one equation.

    Args:
        text: an equation in plain text.

    Example:
        >>> math("√S")
        '<math displaystyle="true"><msqrt><mi>S</mi></msqrt></math>'
    """
    return f'<math displaystyle="true">{_Equation(text).row()}</math>'


def _remark(text: str) -> str:
    """A remark: an equation if it has a sign of one, otherwise words."""
    if re.search(r"[=←]", text):
        return math(text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _rows(block: str) -> Iterator[tuple[str, str, str]]:
    """The label, the equation and the remarks of each line."""
    for line in filter(str.strip, block.splitlines()):
        label, equation, *remarks = ["", *re.split(r" {2,}", line.strip())]
        if equation.endswith(":"):
            label, equation, *remarks = equation, *remarks
        yield label, math(equation), " &emsp; ".join(map(_remark, remarks))


def box(block: str) -> str:
    """Returns an algorithm box as an HTML table, in one line so that Markdown leaves it alone.

    Args:
        block: its lines, each a label if it ends with a colon, an equation, and remarks, with two
            or more spaces between them.
    """
    rows = [*_rows(block)]
    used = [any(row[column] for row in rows) for column in range(3)]
    names = ("label", "equation", "remark")
    cells = lambda row: "".join(
        f'<td class="{name}">{cell}</td>'
        for name, cell, is_used in zip(names, row, used, strict=True)
        if is_used
    )
    lines = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return f'<div class="algorithm"><table class="lines">{lines}</table></div>'


LITERAL = re.compile(r"^(?P<before>.*?)::\n\n(?P<block>(?:    .*\n?|\n(?=\n*    ))+)", re.MULTILINE)


def with_boxes(docstring: str) -> str:
    """Replaces literal blocks after ``::`` by boxes, or by code if they have no mathematics.

    Args:
        docstring: Markdown, but for such blocks.
    """

    def replace(found: re.Match[str]) -> str:
        before, block = found["before"].rstrip(), textwrap.dedent(found["block"]).strip("\n")
        is_mathematics = re.search("[←·√Σ‖∘]", block)
        shown = box(block) if is_mathematics else f"```text\n{block}\n```"
        return f"{before and before + ':'}\n\n{shown}\n\n"

    return LITERAL.sub(replace, docstring)
