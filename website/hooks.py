"""A hook of MkDocs: adds the generated pages and the files outside `docs` that pages link to."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `mkdocs` does not, `python -m mkdocs` does

from website import methods, reference  # noqa: E402

#: A link from a page to a file that is not in `docs`.
OUTSIDE = re.compile(r"(\]\(|src=\")\.\./(?P<path>[\w./-]+\.\w+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills in the generated parts of the navigation, and addresses from pyproject.toml."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    config.repo_url, config.site_url = urls.get("Repository"), urls.get("Documentation")
    for entry in config.nav or []:
        if "Methods" in entry:
            entry["Methods"] += [f"methods/{name}.md" for name in methods.available("memopt")]
        if "API" in entry:
            entry["API"] += [f"api/{page.name}.md" for page in reference.PAGES]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is generated, and what is linked to from outside `docs`."""
    missing = reference.undocumented()
    if missing:
        raise PluginError(f"These public names have no docstring: {', '.join(missing)}.")

    def add(path: str, content: str) -> None:
        files.append(File.generated(config, path, content=content))

    add("methods/index.md", methods.index())
    for name in methods.available("memopt"):
        add(f"methods/{name}.md", methods.page(name))
        for picture, drawn in methods.pictures(name).items():
            add(f"methods/{picture}", drawn)
    for page in reference.PAGES:
        add(f"api/{page.name}.md", reference.text(page))
    add("changelog.md", (ROOT / "CHANGELOG.md").read_text())
    linked = {
        m["path"] for f in files.documentation_pages() for m in OUTSIDE.finditer(f.content_string)
    }
    for path in sorted(linked):
        if files.get_file_from_path(path) is None and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Leads links out of `docs` to the copies in the site."""
    if "/" in page.file.src_uri:  # generated pages have none
        return markdown
    return OUTSIDE.sub(r"\1\g<path>", markdown)
