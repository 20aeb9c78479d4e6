"""README and docs say what the result files say, and these say how they were made."""

import importlib.util
import json
import re

import pytest

from benchmarks import claims, report, results

TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
FILES = sorted(results.RESULTS.glob("*.json"))

#: Files from before `benchmarks.report.Report`, which records machine and versions.
OLD = {
    *("baselines", "finetune", "pods", "sharding_time"),
    *("memory_fine_tuning", "memory_fine_tuning_rtx4090", "memory_rtx4090"),
}


def test_pages_are_what_the_result_files_say():
    different = [
        page.name
        for page, text in results.pages().items()
        if not page.exists() or page.read_text() != text
    ]
    assert different == [], "run python -m benchmarks.results"


def test_another_figure_in_a_file_is_seen(monkeypatch):
    """The tables come from the files: a step that takes a second more is another table."""
    [block] = [
        block
        for _, block in results.blocks(results.ROOT / "docs" / "speed.md")
        if block.function == "benchmarks.step_time.markdown"
    ]
    before, read = block.text(), results.read

    def slower(path):
        found = read(path)
        found["results"][0]["milliseconds"]["median"] += 1000
        return found

    monkeypatch.setattr(results, "read", slower)
    assert block.text() != before


def test_every_marked_block_is_read():
    for page in results.sources():
        begun = re.findall(r"^<!-- from", page.read_text(), re.MULTILINE)
        assert len(begun) == len([*results.blocks(page)]), page.name


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.text[:30])
def test_a_sentence_says_what_its_file_says(claim):
    assert claim.holds(), f"{claim.page} must say: {claim.sentence()}"


def test_tables_with_numbers_are_from_files_or_listed():
    unlisted, listed = [], {page: set(tables) for page, tables in claims.NOT_MEASURED.items()}
    for page in results.sources():
        name = str(page.relative_to(results.ROOT))
        for table in TABLE.findall(results.BLOCK.sub("", page.read_text())):
            head, _, *rows = table.splitlines()
            begin = [b for b in claims.NOT_MEASURED.get(name, ()) if head.startswith(f"| {b}")]
            if begin:
                listed[name] -= {max(begin, key=len)}
            elif re.search(r"\d", "".join(rows)):
                unlisted.append((name, head))
    assert unlisted == []
    assert not any(listed.values()), listed  # all that are listed exist


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_how_it_was_made(path):
    found = json.loads(path.read_text())
    module = re.match(r"python -m (benchmarks\.\w+)", found["command"])
    assert importlib.util.find_spec(module[1])
    has = all(key in found for key in ("cpu", "cores", "versions"))
    assert has == (path.stem not in OLD)


def test_a_report_has_command_machine_versions_and_what_is_added_later(tmp_path):
    path = tmp_path / "new" / "lion.json"
    made = report.Report("lion", ["--steps", "a b"], path, [], ["numpy"], steps=3)
    made.save()
    made.results.append({"loss": 1.0})
    made.save(best=2)
    found = json.loads(path.read_text())
    assert found["command"] == "python -m benchmarks.lion --steps 'a b'"
    assert {"jax", "jaxlib", "memopt", "numpy", "optax", "python"} <= set(found["versions"])
    assert list(found)[:2] == ["command", "steps"]
    assert (found["cores"] > 0, found["device"], found["best"]) == (True, "cpu", 2)
    assert report.read_results(path, {"steps": 3}) == [{"loss": 1.0}]
    with pytest.raises(ValueError, match=r"steps must be 3, as of the runs in .*, got 4"):
        report.read_results(path, {"steps": 4})
    assert report.read_results(tmp_path / "none.json", {"steps": 4}) == []
