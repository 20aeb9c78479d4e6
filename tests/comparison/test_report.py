"""Tables and pictures of a comparison."""

import io
import itertools
import json
import math

import matplotlib.figure
import pytest
from rich.console import Console

from memopt.comparison import report
from memopt.comparison.analysis import summarize, unfinished
from memopt.comparison.plots import plot_curves, plot_front, plot_sensitivity
from memopt.comparison.report import (
    ONLY_IN_FILES,
    sections,
    sections_to_target,
    tables,
    to_json,
    write_report,
)
from tests.comparison.synthetic import run, seeds

RUNS = [
    *seeds("adamw", 2.0, 2.02, 1.98),
    *seeds("muon", 1.5, 1.52, 1.48, state_bytes=600),
    *seeds("lomo", 3.5, 3.6, state_bytes=0),
    *seeds("lion", None, 2.0),
    run("fira", tuned=False),
]


def rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head, *rest = lines
    return {row[0]: dict(zip(head, row, strict=True)) for row in rest}


@pytest.fixture
def no_pictures(monkeypatch):
    for plot in ("plot_front", "plot_curves", "plot_sensitivity"):
        monkeypatch.setattr(report, plot, lambda groups, path, **options: None)


def written(directory, runs, name="compare.jsonl"):
    """The tables of a report on these runs, and its text."""
    (directory / name).write_text("".join(json.dumps(run) + "\n" for run in runs))
    shown = write_report(directory)
    return shown, (directory / "report.md").read_text()


def test_the_table_in_markdown(no_pictures, tmp_path):
    _, text = written(tmp_path, RUNS)
    found = rows(text)
    assert [*found] == ["muon", "adamw", "lomo", "lion"]
    muon = found["muon"]
    assert (muon["loss"], muon["seeds"]) == ("1.500 ± 0.020", "3")
    assert (muon["− adamw"], muon["p < 0.01"], muon["speed-up"]) == ("-0.500", "better", "1.25")
    assert (muon["steps to target"], muon["tokens to target"]) == ("80", "5.12k")
    assert (muon["ms a step"], muon["state"]) == ("20.0", "600 B")
    assert found["lion"]["loss"] == "1 of 2 diverged"
    assert found["lion"]["p < 0.01"] == "worse"
    assert (found["lomo"]["steps to target"], found["lomo"]["state"]) == ("> 100", "0")
    assert "## 2M parameters, 100 steps of 8×8 tokens, 6.4k in all" in text
    assert "- fira, 2M parameters, 100 steps of 8×8 tokens, 6.4k in all: 1 runs to tune" in text
    assert "`memopt compare`" in text
    assert "`cpu abacus`" in text
    assert "`jax 0.10`" in text


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [((2.01, 2.03), "no difference"), ((2.5,), "too few seeds"), ((1.5, 1.52), "better")],
)
def test_verdicts_are_words(losses, verdict):
    [section] = sections(summarize([*seeds("adamw", 2.0, 2.02, 1.98), *seeds("lion", *losses)]))
    cells = {row[0]: dict(zip(section.columns, row, strict=True)) for row in section.rows}
    assert (cells["lion"]["p < 0.01"], cells["adamw"]["p < 0.01"]) == (verdict, "–")


def test_the_range_of_learning_rates_is_a_column():
    tuning = [run(loss=x, rate=r, seed=9, tuned=False) for r, x in ((1, 2.04), (2, 2.0), (4, 2.04))]
    [section] = sections(summarize([*tuning, *seeds("adamw", 2.0)]))
    assert dict(zip(section.columns, section.rows[0], strict=True))["rates within 1%"] == "2.0×"
    [section] = sections(summarize([*tuning[1:], *seeds("adamw", 2.0)]))
    assert dict(zip(section.columns, section.rows[0], strict=True))["rates within 1%"] == "≥ 1.4×"


def test_columns_without_values_are_left_out():
    [section] = sections(summarize(seeds("adamw", 2.0, 2.1, step_seconds=None)))
    assert "ms a step" not in section.columns
    assert "CPU ms a step" in section.columns


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"text": "1fe77a0b"}, "text 1fe77a"),
        ({"eval_tokens": 2048}, "evaluated on 2.05k"),
        ({"steps": 200, "tokens": 12800}, "200 steps"),
        ({"seq_len": 16}, "8×16 tokens"),
        ({"batch_size": 4}, "4×8 tokens"),
        ({"parameters": 130}, "130 exactly"),
    ],
)
def test_other_protocols_are_tables_of_other_names(other, name):
    shown = sections(summarize([*seeds("adamw", 2.0), *seeds("adamw", 1.0, **other)]))
    assert [[row[1] for row in section.rows] for section in shown] == [["2.000"], ["1.000"]]
    assert name in shown[1].title
    assert name not in shown[0].title


def test_the_terminals_tables_have_the_same_cells_in_80_columns():
    console = Console(record=True, width=80, file=io.StringIO())
    runs = [*RUNS, *seeds("apollo_mini, weights int8", 2.01, 2.03, state_bytes=1_230_000)]
    [section] = sections(summarize(runs))
    console.print(*tables([section]))
    shown = console.export_text()
    for row in section.rows:
        cells = dict(zip(section.columns, row, strict=True))
        left = {name: cell for name, cell in cells.items() if name not in ONLY_IN_FILES}
        assert len(left) == 6
        assert all(word in shown for cell in left.values() for word in cell.split(", "))
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "…" not in shown


def test_json_has_no_infinite_numbers():
    found = json.loads(to_json(summarize(RUNS)), parse_constant=pytest.fail)
    lion = next(s for s in found if s["method"] == "lion")
    assert lion["loss"] is None
    assert lion["losses"] == [None, 2.0]
    assert (lion["size"], lion["tokens"], lion["verdict"]) == ("2M", 6400, "worse")


def test_files_of_a_report(tmp_path):
    shown, text = written(tmp_path, RUNS)
    assert [len(section.rows) for section in shown] == [4]
    assert json.loads((tmp_path / "report.json").read_text())[0]["method"] == "muon"
    with (tmp_path / "compare.jsonl").open("a") as file:
        file.write('{"method": "torn')
    assert (write_report(tmp_path), (tmp_path / "report.md").read_text()) == (shown, text)
    for name in ("front", "curves", "sensitivity"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_without_tuned_runs_is_reported_as_such(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was compared yet"):
        write_report(tmp_path)
    shown, text = written(tmp_path, [run("lion", tuned=False)])
    assert shown == []
    assert "1 runs to tune it, none at the tuned setting" in text
    assert not (tmp_path / "front.png").exists()


def test_steps_to_a_target_are_a_table_of_each_batch_size(tmp_path):
    target = {"target_loss": 2.1, "batch_size": 4}
    runs = [
        *seeds("adamw", 2.05, 2.15, steps=400, **target),
        *seeds("muon", 2.0, 2.1, steps=240, rate=0.1, **target),  # of an earlier setting
        *seeds("muon", 2.0, 2.1, steps=200, **target),
        *seeds("muon", 2.0, steps=100, **target | {"batch_size": 8}),
        run("muon", 1.9, steps=800, tuned=False, **target),
        run("lion", 2.9, steps=800, tuned=False, **target),
    ]
    shown, text = written(tmp_path, runs, "targets.jsonl")
    all_sizes, four, eight = shown
    assert four.title == "Fewest steps to a loss of 2.1, 2M parameters, 4 rows a batch"
    assert four.title in text
    assert [row[:5] for row in four.rows] == [
        ["muon", "200", "6.4k", "2 of 2", "2.050"],
        ["adamw", "400", "6.4k", "1 of 2", "2.100"],
    ]
    assert four.remark == "Not reached or not finished: lion."
    assert [row[:2] for row in eight.rows] == [["muon", "100"]]
    assert all_sizes.columns == ["method", "4 rows", "8 rows"]
    assert all_sizes.rows == [["adamw", "400", "–"], ["muon", "200", "100"], ["lion", "–", "–"]]


def test_runs_to_a_target_on_another_text_are_another_table():
    target = {"target_loss": 2.1}
    runs = [*seeds("adamw", 2.0, **target), *seeds("adamw", 2.0, text="other", **target)]
    assert [section.rows[0][0] for section in sections_to_target(runs)] == ["adamw", "adamw"]


@pytest.fixture
def drawn(monkeypatch):
    """Figures, as they are saved."""
    figures = []

    def save(figure, *_, **__):
        figure.draw_without_rendering()  # warns as savefig does, and takes less time
        figures.append(figure)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    return figures


def test_thirty_methods_are_legible_and_none_is_lost(drawn, tmp_path):
    runs = [*seeds("adamw", 2.0, 2.02), *seeds("nothing", 2.03, 2.03, state_bytes=0)]
    for i in range(28):
        loss = 2.0 + 0.004 * (i % 7)
        runs += seeds(f"method_{i}", loss, loss + 0.02, state_bytes=500 + 60 * (i // 3))
    runs += [*seeds("awful", 90.0, 90.0), *seeds("lost", None, None), run("begun", tuned=False)]
    groups = summarize(runs)
    plot_front(groups, tmp_path / "front.png", missing=unfinished(runs))
    [axes] = drawn[0].axes

    names = {s.method for s in groups[0]} - {"awful", "lost"}
    labels = [text for text in axes.texts if text.get_text() in names]
    boxes = [super(type(text), text).get_window_extent() for text in labels]  # without the arrow
    frame = axes.get_window_extent()
    assert len(labels) == 30
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    for box, other in itertools.combinations(boxes, 2):
        assert not box.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9))

    assert axes.get_ylim()[1] < 3
    below = axes.get_xlabel().splitlines()
    told = ["Above this picture: awful 90.00.", "Diverged: lost.", "Not finished: begun."]
    assert below == ["bytes of optimizer state a parameter", *told]
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks == ["under 0.01", "0.01", "0.03", "0.1", "0.3", "1", "2", "4", "8", "16"]
    zero = axes.get_xticks()[0]
    at = [x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert axes.get_xlim()[0] < zero == min(at) < 0.01
    assert sorted(at)[1] == pytest.approx(500 / 125)  # bytes a parameter


def test_curves_are_whole_from_a_tenth_of_the_run_on(drawn, tmp_path):
    plot_curves(summarize(RUNS), tmp_path / "curves.png")
    [axes] = drawn[0].axes
    (low, high), (first, last) = axes.get_ylim(), axes.get_xlim()
    assert low < 1.5
    assert 3.375 < high < 3.9  # muon's and AdamW's curves begin at 3.375 and 3.5
    assert (first, last) == pytest.approx(
        (1600, 6400)
    )  # at the first evaluation, a quarter of the run
    names = [text.get_text() for text in axes.texts]
    assert names == ["muon", "adamw", "lomo"]


def test_each_tuned_method_has_a_panel_beside_the_baselines_curve(drawn, tmp_path):
    runs = [
        run(name, loss, rate=rate, seed=9, tuned=False)
        for name in ("lion", "adamw")
        for rate, loss in ((0.5, 2.1), (1, 2.0), (2, None))
    ]
    runs += [*RUNS, *seeds("lion, state int8", 2.0, tuned_as="lion")]
    plot_sensitivity(summarize(runs), tmp_path / "sensitivity.png")
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["adamw", "lion"]
    curves = {
        axes.get_title(): [line.get_xydata().tolist() for line in axes.lines] for axes in panels
    }
    curve = [[0.5, pytest.approx(0.1)], [1, 0], [2, math.inf]]
    assert curves["adamw"][0] == curves["lion"][0] == curves["lion"][1] == curve
    assert curves["lion"][2] == [[2, pytest.approx(0.19)]]  # the rate at which it diverged


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
        plot(summarize(runs), tmp_path / "plot.png")
    assert len(drawn) == 3
