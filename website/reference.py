"""The pages of the API reference: every public name, by the room that it is from.

A module's public names are the functions and classes that it defines, and all that it imports as
itself (``import x as x``), but for modules and names that begin with an underscore.
"""

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import memopt
from memopt.optimizers.registry import METHODS

#: Code that begins with a name of memopt's, in a text.
CODE = re.compile(r"(?<!\[)`(memopt\.[\w.]+)(?:\([^`]*\))?`")


class Page(NamedTuple):
    """A page of the reference.

    Attributes:
        name: its file's name.
        title: its title.
        about: a sentence or two below the title, in Markdown.
        modules: the public modules whose names it has.
        rooms: the beginnings of the modules in which these names are defined.
    """

    name: str
    title: str
    about: str
    modules: tuple[str, ...]
    rooms: tuple[str, ...] = ("memopt",)


PAGES = (
    Page(
        "optimizers",
        "Optimizers",
        "Each method has [a page of its own](../methods.md). Here are the functions that "
        "find one by name, and what all methods share.",
        ("memopt.optimizers",),
    ),
    Page(
        "transforms",
        "Transformations",
        "The parts of the methods, for chains of your own ([Compose](../compose.md)).",
        ("memopt.transforms",),
    ),
    Page(
        "projectors",
        "Projectors",
        "Rules that give each matrix the subspace in which `memopt.in_subspace` works "
        "([Optimizers in a subspace](../subspace.md)).",
        ("memopt.transforms.projectors",),
    ),
    Page(
        "recombine",
        "Recombinations",
        "Rules that make a full-size update of one in a subspace.",
        ("memopt.transforms.recombine",),
    ),
    Page(
        "matrices",
        "Matrices",
        "Which axes of a parameter are rows and columns, and what it is taken for "
        "([Which parameters are matrices](../models.md)).",
        ("memopt",),
        ("memopt.axes", "memopt.matrices", "memopt.parameters", "memopt.errors"),
    ),
    Page(
        "state",
        "State",
        "Bytes, sharding and precision of the state of any Optax transformation.",
        ("memopt",),
        ("memopt.state",),
    ),
    Page(
        "codecs",
        "Codecs",
        "Storage in 16, 8 or 4 bits ([Fewer bits](../precision.md)).",
        ("memopt.state.codecs",),
    ),
    Page(
        "schedules",
        "Schedules",
        "Learning rates and batch sizes as functions of the step "
        "([Learning rates](../learning_rates.md)).",
        ("memopt.schedules",),
    ),
    Page(
        "laws",
        "Laws",
        "Published laws of rates, batches and losses ([Laws](../laws.md)).",
        ("memopt.schedules.laws",),
    ),
    Page(
        "diagnostics",
        "Diagnostics",
        "Measurements of what an optimizer does to each matrix ([Diagnostics](../diagnostics.md)).",
        ("memopt.diagnostics",),
    ),
    Page(
        "models",
        "Models",
        "The model that the training steps take, and memopt's LLaMA "
        "([Your own model](../own_models.md)).",
        ("memopt.models", "memopt.models.llama"),
    ),
    Page(
        "training",
        "Training",
        "The training step and the [released](../release.md) one, checkpoints and controllers.",
        ("memopt.training", "memopt.training.release", "memopt.training.controllers"),
    ),
    Page(
        "planning",
        "Planning",
        "The memory of a step, from the compiler of a chip ([Plan](../plan.md)).",
        ("memopt", "memopt.planning"),
        ("memopt.planning",),
    ),
    Page(
        "integrations",
        "Integrations",
        "Adapters to libraries that do not take an Optax transformation "
        "([Flax, Equinox, Haiku and Keras](../libraries.md), "
        "[Tunix, Kauldron, Levanter, EasyDeL and MaxText](../trainers.md)).",
        ("memopt.integrations",),
    ),
    Page(
        "comparison",
        "Comparison",
        "Optimizers tuned with the same budget, and compared.",
        ("memopt.comparison",),
    ),
)


def public_names(module: str) -> dict[str, str]:
    """The public names of a module, each with the module that it is defined in.

    Args:
        module: an importable module.

    Example:
        >>> public_names("memopt.planning")["fit_mesh"]
        'memopt.planning.fit'
    """
    return {
        name: home
        for name, home in _exported(_body(module), module)
        if not name.startswith("_")
        if not inspect.ismodule(getattr(importlib.import_module(module), name))
    }


@functools.cache
def _body(module: str) -> list[ast.stmt]:
    return ast.parse(Path(str(importlib.import_module(module).__file__)).read_text()).body


def _exported(body: list[ast.stmt], module: str) -> Iterator[tuple[str, str]]:
    for node in body:
        match node:
            case ast.ImportFrom(module=str(source)):
                for alias in node.names:
                    if alias.name == "*":
                        names = importlib.import_module(source).__all__
                        yield from ((name, _home(source, name)) for name in names)
                    elif alias.asname == alias.name:
                        yield alias.name, _home(source, alias.name)
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield name, module
            case ast.If(test=ast.Name(id="TYPE_CHECKING" | "_TYPE_CHECKING")):
                yield from _exported(node.body, module)


def _home(module: str, name: str) -> str:
    """The module that defines a name that another has imported."""
    for node in _body(module):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _home(str(node.module), name) if node.module != module else module
    return module


def has_docstring(module: str, name: str) -> bool:
    """Whether the source of a module describes what it defines under a name."""
    body = _body(module)
    for node, after in zip(body, [*body[1:], None], strict=True):
        match node:
            case ast.ClassDef() | ast.FunctionDef() if node.name == name:
                return ast.get_docstring(node) is not None
            case (
                ast.Assign(targets=[ast.Name(id=found)]) | ast.AnnAssign(target=ast.Name(id=found))
            ):
                if found == name:
                    return isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return False


def names_on(page: Page) -> dict[str, tuple[str, str]]:
    """The names on a page, functions first and states last, each with its module and its home."""
    found = {
        name: (module, home)
        for module in page.modules
        for name, home in public_names(module).items()
        if home.startswith(page.rooms) and name not in METHODS
    }
    order = lambda name: (name.endswith("State"), not name.islower(), name)
    return {name: found[name] for name in sorted(found, key=order)}


def undocumented() -> list[str]:
    """Public names that have no docstring."""
    return sorted(
        f"{module}.{name}"
        for module in {module for page in PAGES for module in page.modules}
        for name, home in public_names(module).items()
        if name not in METHODS and not has_docstring(home, name)
    )


def text(page: Page) -> str:
    """The Markdown of a page."""
    parts = [f"# {page.title}", page.about]
    for name, (module, home) in names_on(page).items():
        path = public_path(module, name)
        anchor = f"[](){{ #{path} }}\n\n" if path != f"{home}.{name}" else ""
        parts.append(f"{anchor}::: {home}.{name}")
    return "\n\n".join(parts) + "\n"


def public_path(module: str, name: str) -> str:
    """The shortest path by which users reach a name.

    Example:
        >>> public_path("memopt.transforms.projectors", "svd")
        'memopt.projectors.svd'
    """
    last, named = module.rpartition(".")[2], getattr(importlib.import_module(module), name)
    for path, start in (("memopt", memopt), (f"memopt.{last}", getattr(memopt, last, None))):
        if getattr(start, name, None) is named:
            return f"{path}.{name}"
    return f"{module}.{name}"


@functools.cache
def paths() -> frozenset[str]:
    """The paths of all public names, and of the methods."""
    names = {public_path(m, name) for page in PAGES for name, (m, _) in names_on(page).items()}
    return frozenset(names | {f"memopt.{name}" for name in METHODS})


def with_links(markdown: str) -> str:
    """Makes links of the public names in Markdown, but for those in blocks of code.

    Example:
        >>> with_links("`memopt.lion(1e-4)` and `memopt.lionel`")
        '[`memopt.lion(1e-4)`][memopt.lion] and `memopt.lionel`'
    """
    link = lambda m: f"[{m[0]}][{m[1]}]" if m[1] in paths() else m[0]
    texts_and_blocks = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else CODE.sub(link, part) for part in texts_and_blocks
    )
