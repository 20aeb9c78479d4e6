"""A hook of MkDocs: adds the generated pages and the files outside `docs` that pages link to."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `mkdocs` does not, `python -m mkdocs` does

from memopt.optimizers.registry import available  # noqa: E402
from website import commands, methods, notebooks, reference  # noqa: E402

#: Pages beside the code; their links begin at the root.
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md")
#: A link from a page to a file that is not in `docs`.
OUTSIDE = re.compile(r"(\]\()\.\./(?P<path>[\w./-]+)")
#: A link to a notebook, which is a page of the site.
NOTEBOOK = re.compile(r"(\]\(notebooks/\w+)\.ipynb(?=\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the generated pages to the navigation, and addresses from pyproject.toml."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    config.repo_url, config.site_url = urls.get("Repository"), urls.get("Documentation")
    for entry in config.nav or []:
        if "Methods" in entry:
            entry["Methods"] += [f"methods/{name}.md" for name in available("memopt")]
        if "Notebooks" in entry:
            entry["Notebooks"] += [f"notebooks/{path.stem}.md" for path in notebooks.paths()]
        if "API" in entry:
            entry["API"] += [f"api/{page.name}.md" for page in reference.PAGES]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is generated, and what pages link to outside `docs`."""
    missing = reference.undocumented()
    if missing:
        raise PluginError(f"These public names have no docstring: {', '.join(missing)}.")

    def add(path: str, content: str | bytes) -> None:
        files.append(File.generated(config, path, content=content))

    pages = [file.content_string for file in files.documentation_pages()]
    for file in notebooks.paths():
        essay = notebooks.notebook(file)
        pages.append(notebooks.page(essay, config.repo_url))
        add(f"notebooks/{file.stem}.md", pages[-1])
        add(f"notebooks/{file.name}", file.read_text())
        for picture, content in essay.pictures.items():
            add(f"notebooks/{picture}", content)
    for name in BESIDE:
        text = re.sub(r"\]\((?!https?:|#|docs/)", "](../", (ROOT / name).read_text())
        pages.append(text)
        add(name, text.replace("](docs/", "]("))
    for path in sorted({found["path"] for text in pages for found in OUTSIDE.finditer(text)}):
        is_there = path in BESIDE or files.get_file_from_path(path)
        if (ROOT / path).is_file() and not is_there:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for name in available("memopt"):
        add(f"methods/{name}.md", methods.page(name))
        for picture, drawn in methods.pictures(name).items():
            add(f"methods/{picture}", drawn)
    for page in reference.PAGES:
        add(f"api/{page.name}.md", reference.text(page))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Leads links out of `docs` to the copies in the site, and makes links of public names."""
    if "/" not in page.file.src_uri:  # generated pages have no such links
        markdown = OUTSIDE.sub(r"\1\g<path>", markdown)
        markdown = NOTEBOOK.sub(r"\1.md", markdown).replace(notebooks.GALLERY, notebooks.gallery())
    if commands.PLACE in markdown:
        markdown = markdown.replace(commands.PLACE, commands.text())
    if page.file.src_uri.startswith("notebooks/"):
        markdown = notebooks.FORMULA.sub(_mathml, markdown)
    return reference.with_links(markdown)


def _mathml(found: re.Match[str]) -> str:
    """A formula in MathML, which browsers show without a script; a block of code as it is."""
    if found["block"]:
        return convert(found["block"].strip(), display="block")
    return convert(found["inline"]) if found["inline"] else found[0]
