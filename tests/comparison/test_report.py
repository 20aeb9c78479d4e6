"""Tables and pictures of a comparison."""

import io
import itertools
import json

import matplotlib.figure
import pytest
from rich.console import Console

from memopt.comparison.analysis import summarize
from memopt.comparison.plots import plot_curves, plot_front, plot_sensitivity
from memopt.comparison.report import (
    ONLY_IN_FILES,
    by_size,
    markdown,
    sections,
    tables,
    to_json,
    write_report,
)
from tests.comparison.synthetic import run, seeds

RUNS = [
    *seeds("adamw", 2.0, 2.02, 1.98),
    *seeds("muon", 1.5, 1.52, 1.48, state_bytes=600),
    *seeds("lomo", 3.5, 3.6, state_bytes=0),
    *seeds("lion", None, 2.0, peak_bytes=2_000_000),
    run("fira", tuned=False),
]


def rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head, *rest = lines
    return {row[0]: dict(zip(head, row, strict=True)) for row in rest}


def test_the_table_in_markdown():
    text = markdown(sections(summarize(RUNS)), runs=RUNS)
    found = rows(text)
    assert [*found] == ["muon", "adamw", "lomo", "lion"]
    muon = found["muon"]
    assert (muon["loss"], muon["seeds"]) == ("1.500 ± 0.020", "3")
    assert (muon["− adamw"], muon["verdict"], muon["speed-up"]) == ("-0.500", "better", "1.25")
    assert (muon["steps to target"], muon["tokens to target"]) == ("80", "5.12k")
    assert (muon["ms a step"], muon["state"], muon["peak"]) == ("20.0", "600 B", "–")
    assert found["lion"]["loss"] == "1 of 2 diverged"
    assert (found["lion"]["verdict"], found["lion"]["peak"]) == ("worse", "2 MB")
    assert found["lomo"]["steps to target"] == "not reached"
    assert found["lomo"]["state"] == "0"
    assert "fira at 2M, batches of 8: 1 runs, none tuned yet." in text
    assert "`memopt compare`" in text
    assert "`cpu abacus`" in text
    assert "`jax 0.10`" in text


def test_columns_without_values_are_left_out():
    assert "peak" not in markdown(sections(summarize(seeds("adamw", 2.0, 2.1))))


def test_the_terminals_tables_have_the_same_cells_in_80_columns():
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(*tables(sections(summarize(RUNS))))
    shown = console.export_text()
    for row in rows(markdown(sections(summarize(RUNS)))).values():
        left = {name: cell for name, cell in row.items() if name not in ONLY_IN_FILES}
        assert len(left) == 7
        assert all(cell in shown for cell in left.values())


def test_json_has_no_infinite_numbers():
    found = json.loads(to_json(summarize(RUNS)), parse_constant=pytest.fail)
    lion = next(s for s in found if s["method"] == "lion")
    assert lion["loss"] is None
    assert lion["losses"] == [None, 2.0]


def test_files_of_a_report(tmp_path):
    lines = "".join(json.dumps(r) + "\n" for r in RUNS) + '{"method": "torn'
    (tmp_path / "compare.jsonl").write_text(lines)
    shown = write_report(tmp_path)
    assert [len(section.rows) for section in shown] == [4]
    assert json.loads((tmp_path / "report.json").read_text())[0]["method"] == "muon"
    assert (tmp_path / "report.md").read_text() == markdown(shown, runs=RUNS)
    for name in ("front", "curves", "sensitivity"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_without_tuned_runs_is_reported_as_such(tmp_path):
    with pytest.raises(ValueError, match="nothing was compared yet"):
        write_report(tmp_path)
    (tmp_path / "compare.jsonl").write_text(json.dumps(run("lion", tuned=False)) + "\n")
    assert write_report(tmp_path) == []
    assert "none tuned yet" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "front.png").exists()


def test_steps_to_a_target_are_a_table_of_each_batch_size(tmp_path):
    target = {"target_loss": 2.1, "batch_size": 4}
    runs = [
        *seeds("adamw", 2.05, 2.15, steps=400, **target),
        *seeds("muon", 2.0, 2.1, steps=200, **target),
        *seeds("muon", 2.0, steps=100, **target | {"batch_size": 8}),
        run("muon", 1.9, steps=800, tuned=False, **target),
    ]
    (tmp_path / "targets.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    shown = write_report(tmp_path)
    assert [section.title.rpartition(", ")[2] for section in shown] == [
        "4 rows a batch",
        "8 rows a batch",
    ]
    assert [row[:4] for row in shown[0].rows] == [
        ["muon", "200", "6.4k", "2 of 2"],
        ["adamw", "400", "6.4k", "1 of 2"],
    ]
    assert "Fewest steps to a loss of 2.1" in (tmp_path / "report.md").read_text()


@pytest.fixture
def drawn(monkeypatch):
    """Figures, as they are saved."""
    figures = []

    def save(figure, *_, **__):
        figure.draw_without_rendering()  # warns as savefig does, and takes less time
        figures.append(figure)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    return figures


def test_thirty_methods_are_legible_and_zero_bytes_are_drawn(drawn, tmp_path):
    runs = [*seeds("adamw", 2.0, 2.02), *seeds("nothing", 2.03, 2.03, state_bytes=0)]
    for i in range(28):
        loss = 2.0 + 0.004 * (i % 7)
        runs += seeds(f"method_{i}", loss, loss + 0.02, state_bytes=500 + 60 * (i // 3))
    summaries = summarize([*runs, *seeds("awful", 90.0, 90.0)])
    plot_front(by_size(summaries), tmp_path / "front.png")
    [axes] = drawn[0].axes

    names = {s.method for s in summaries} | {"awful (90.00)"}
    labels = [text for text in axes.texts if text.get_text() in names]
    boxes = [super(type(text), text).get_window_extent() for text in labels]  # without the arrow
    frame = axes.get_window_extent()
    assert len(labels) == 31
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    for box, other in itertools.combinations(boxes, 2):
        assert not box.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9))

    assert axes.get_ylim()[1] < 3  # the awful one is at the edge
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    zero = axes.get_xticks()[ticks.index("0")]
    at = [x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert axes.get_xlim()[0] < zero == min(at) < 500


@pytest.mark.parametrize(
    "runs",
    [
        seeds("adamw", None, None),
        seeds("lomo", 2.0, state_bytes=0),
        seeds("adamw", 2.0) + [dict(r, size="1M") for r in seeds("lion", 2.0, None)],
    ],
)
def test_little_is_drawn_without_warnings(drawn, runs, tmp_path):
    for plot in (plot_front, plot_curves, plot_sensitivity):
        plot(by_size(summarize(runs)), tmp_path / "plot.png")
    assert len(drawn) == 3
