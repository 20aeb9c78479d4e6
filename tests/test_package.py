"""The distributions of a release, and the files beside the code."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
PACKAGE = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "memopt").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def test_the_newest_changes_and_the_citation_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    newest = re.search(r"^## (\S+), (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest.groups() == (VERSION, citation["date-released"])


def test_workflows_run_the_pythons_that_the_classifiers_name():
    tests = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    prefix = "Programming Language :: Python :: "
    named = {
        line.removeprefix(prefix)
        for line in PROJECT["project"]["classifiers"]
        if re.fullmatch(rf"{prefix}\d\.\d+", line)
    }
    assert {*tests["jobs"]["tests"]["strategy"]["matrix"]["python"]} == named


def test_each_mark_has_its_command_in_the_page_for_contributors():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for mark in PROJECT["tool"]["pytest"]["ini_options"]["markers"]:
        assert f"pytest -m {mark.partition(':')[0]}" in text


def test_links_of_the_pages_beside_the_code_lead_to_files():
    for page in ("CHANGELOG", "CODE_OF_CONDUCT", "CONTRIBUTING", "SECURITY"):
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / f"{page}.md").read_text()):
            assert (ROOT / link).exists(), f"{page}.md links to {link}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.package
def test_the_sdist_has_the_package_its_documents_and_no_tests(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    documents = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
    made = {"pyproject.toml", "constraints.txt", "PKG-INFO", ".gitignore"}
    assert names == PACKAGE | documents | made
    assert built[0].stat().st_size < 1_000_000


@pytest.mark.package
def test_the_wheel_has_the_package_alone(built):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    assert names == PACKAGE
    assert "memopt/py.typed" in names


@pytest.mark.package
def test_a_package_index_takes_both_and_shows_no_broken_links(built):
    from readme_renderer import markdown

    command = [sys.executable, "-m", "twine", "check", "--strict", *built]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    metadata = f"memopt-{VERSION}.dist-info/METADATA"
    text = email.message_from_bytes(zipfile.ZipFile(built[1]).read(metadata)).get_payload()
    page = markdown.render(text)
    assert re.findall(r'(?:href|src)="(?!https?://|#)[^"]*"', page) == []
    assert "<pre" in page
    assert len(text.split()) > 0.9 * len((ROOT / "README.md").read_text().split())


@pytest.mark.package
def test_workflows_have_the_form_that_github_reads():
    workflows = sorted((ROOT / ".github" / "workflows").iterdir())
    schema = ["--builtin-schema", "vendor.github-workflows"]
    subprocess.run([sys.executable, "-m", "check_jsonschema", *schema, *workflows], check=True)


@pytest.mark.package
def test_the_container_is_free_of_known_faults():
    hadolint = Path(sys.executable).with_name("hadolint")
    subprocess.run([hadolint, ROOT / "Dockerfile"], check=True)
