"""Every notebook runs from top to bottom, is committed with its outputs, and is on the site."""

import json
import re
import runpy

import nbformat
import pytest

from website import notebooks, reference

PATHS = notebooks.paths()


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


def code(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_outputs_are_committed(path):
    cells = code(path)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)  # such as warnings
    assert len(notebooks.notebook(path).pictures) >= 2
    assert path.stat().st_size < 300_000


def test_the_first_cell_of_code_says_how_to_run_in_colab(path):
    assert code(path)[0].source.startswith(notebooks.SETUP)


def test_readme_links_to_it(path):
    assert f"](notebooks/{path.name})" in (notebooks.ROOT / "README.md").read_text()


def test_the_gallery_shows_it(path):
    found = notebooks.notebook(path)
    assert f"**[{found.title}](notebooks/{path.stem}.md)**" in notebooks.gallery()
    assert len(found.summary) < 600
    assert found.summary.endswith(".")  # not with a colon before a list that is not shown
    assert found.thumbnail in found.pictures


def test_the_gallery_is_in_the_order_of_readme():
    readme = (notebooks.ROOT / "README.md").read_text()
    named = re.findall(r"\]\(notebooks/(\w+)\.ipynb\)", readme)
    shown = re.findall(r"\*\*\[.*?\]\(notebooks/(\w+)\.md\)\*\*", notebooks.gallery())
    assert named == shown == notebooks.ORDER


def test_modules_of_memopt_that_it_imports_are_in_the_reference(path):
    source = "\n".join(cell.source for cell in code(path))
    imported = set(re.findall(r"^(?:from|import) (memopt[\w.]*)", source, re.MULTILINE))
    assert imported <= {"memopt", *(m for page in reference.PAGES for m in page.modules)}


def write(folder, *cells):
    path = folder / "essay.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    return path


def markdown(*lines):
    return {"cell_type": "markdown", "metadata": {}, "source": "\n".join(lines)}


def drawn(picture, **metadata):
    outputs = [{"output_type": "stream", "text": "said\n"}, {"data": {"image/png": picture}}]
    return {
        "cell_type": "code",
        "metadata": metadata,
        "source": notebooks.SETUP + "draw()",
        "outputs": outputs,
    }


def test_a_page_has_text_code_outputs_and_links(tmp_path):
    text = markdown(
        "# Title", "", "A summary", "of it.", "", "[Pods](../docs/pods.md), [pod](pod.ipynb)"
    )
    cells = text, drawn("AAAA"), drawn("BBBB", tags=["thumbnail"])
    found = notebooks.notebook(write(tmp_path, *cells))
    assert (found.title, found.summary) == ("Title", "A summary of it.")
    assert found.thumbnail == "essay_2.png"
    assert list(found.pictures) == ["essay_1.png", "essay_2.png"]
    page = notebooks.page(found, None)
    assert "[Pods](../pods.md), [pod](pod.md)" in page
    assert "draw()\n```\n\n```text\nsaid\n```\n\n![Figure 1](essay_1.png)" in page
    assert "Colab](" not in page
    assert "clone ADDRESS" in page


def test_a_fork_on_github_opens_in_colab(tmp_path):
    found = notebooks.notebook(write(tmp_path, markdown("# Title", "", "Summary."), drawn("AAAA")))
    address = "https://github.com/someone/fork"
    page = notebooks.page(found, address)
    assert "colab.research.google.com/github/someone/fork/blob/main/notebooks/essay.ipynb" in page
    assert f"clone {address} memopt" in page
    assert "Colab](" not in notebooks.page(found, "https://example.com/someone/fork")


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([markdown("Text without a heading.")], "must begin with a heading"),
        ([markdown("# Title", "", "## Section")], "must begin with a heading"),
        ([markdown("# Title", "", "Summary.")], "has no picture"),
    ],
)
def test_a_notebook_that_cannot_be_shown_is_refused(tmp_path, cells, said):
    with pytest.raises(ValueError, match=said):
        notebooks.notebook(write(tmp_path, *cells))


@pytest.mark.notebooks
def test_it_runs(path):
    runpy.run_path(str(notebooks.FOLDER / "run.py"))["execute"](path)
