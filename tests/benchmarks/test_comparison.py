"""Tables of a comparison's runs, which may not be finished."""

import json

import pytest

from benchmarks import compare_peaks, comparison, results
from memopt.comparison.cells import count_parameters
from memopt.comparison.protocol import PRESETS
from memopt.comparison.rows import ROWS
from memopt.optimizers.registry import METHODS
from tests.comparison.synthetic import run, seeds

RUNS = [
    *(run("adamw", x, 9, r, tuned=False) for r, x in ((0.0005, 2.04), (0.001, 2.0), (0.002, 2.04))),
    *seeds("adamw", 2.0, 2.02, 1.98),
    *seeds("muon", 1.5, 1.52, 1.48, rate=0.02),
    *seeds("muon, state int8", 1.6, 1.62, 1.58, tuned_as="muon", state_bytes=250),
    *seeds("soap, state int8", 1.7, 1.72, tuned_as="soap"),
    *(dict(one, size="0.5M") for one in seeds("adamw", 3.0, 3.02)),
    run("lion", tuned=False),
]


PEAKS = {
    "results": [
        {"size": "2M", "method": "muon", "options": {}, "peak_bytes": 1_500_000},
        {"size": "2M", "method": "muon, state int8", "options": {}, "peak_bytes": 1_400_000},
        {"size": "2M", "method": "adamw", "options": {"b2": 0.9}, "peak_bytes": 2_000_000},
    ]
}


def table(text):
    head, _, *rows = (line.strip("| ").split(" | ") for line in text.splitlines())
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_losses_differences_and_verdicts():
    found = table(comparison.losses({"results": RUNS}, PEAKS))
    assert [*found] == ["muon", "adamw"]
    muon = found["muon"]
    assert (muon["2M: loss"], muon["2M: − adamw"]) == ("1.500", "-0.500 ± 0.016")
    assert (muon["2M: p < 0.01"], muon["2M: steps to its loss"]) == ("better", "80%")
    assert (muon["state, bytes a parameter"], muon["0.5M: loss"]) == ("8", "–")
    assert (muon["2M: peak"], muon["0.5M: peak"]) == ("1.5 MB", "–")
    assert found["adamw"]["2M: peak"] == "–"  # planned with other options
    assert (found["adamw"]["0.5M: loss"], found["adamw"]["2M: p < 0.01"]) == ("3.010", "–")


def test_tuned_rates_and_how_far_they_may_be_off():
    found = table(comparison.rates({"results": RUNS}))
    assert (found["muon"]["2M: rate"], found["muon"]["2M: × adamw's"]) == ("0.02", "20")
    assert found["adamw"]["2M: rates within 1%"] == "0.71–1.41×"
    assert found["muon"]["2M: rates within 1%"] == "–"


def test_rows_with_fewer_bits_are_compared_with_their_exact_twins():
    found = table(comparison.twins({"results": RUNS}, PEAKS))
    assert [*found] == ["muon, state int8", "soap, state int8"]
    cells = found["muon, state int8"]
    assert (cells["2M: − exact"], cells["2M: p < 0.01"]) == ("+0.100 ± 0.000", "worse")
    assert (cells["2M: peak"], cells["2M: exact peak"]) == ("1.4 MB", "1.5 MB")
    assert found["soap, state int8"]["2M: − exact"] == "–"  # its twin is not finished
    assert comparison.twins({"results": seeds("adamw", 2.0)}, PEAKS) == "None is finished yet.\n"


def test_methods_better_than_adamw_are_compared_with_the_control():
    runs = [*seeds("adamw", 2.0, 2.02, 1.98), *seeds("muon", 1.5, 1.52, 1.48)]
    runs += [*seeds("lion", 2.0, 2.01, 1.99), *seeds(comparison.CONTROL, 1.52, 1.54, 1.5)]
    found = table(comparison.against_control({"results": [dict(r, size="0.5M") for r in runs]}))
    assert [*found] == ["muon"]
    assert found["muon"]["0.5M: − control"] == "-0.020 ± 0.016"
    assert found["muon"]["0.5M: p < 0.01"] == "no difference"


def test_twins_are_compared_seed_by_seed():
    exact, bits = seeds("muon", 1.3, 1.5, 1.7), seeds("muon, state int8", 1.32, 1.53, 1.725)
    runs = [*exact, *reversed([dict(one, tuned_as="muon") for one in bits])]
    [cells] = table(comparison.twins({"results": runs}, {"results": []})).values()
    assert (cells["2M: − exact"], cells["2M: p < 0.01"]) == ("+0.025 ± 0.003", "no difference")
    runs = [dict(one, tuned_as="muon") for one in seeds("muon, state int8", 1.32, 1.52, 1.721)]
    [cells] = table(comparison.twins({"results": [*exact, *runs]}, {"results": []})).values()
    assert (cells["2M: − exact"], cells["2M: p < 0.01"]) == ("+0.020 ± 0.000", "worse")


def test_default_learning_rates_are_the_best_of_the_search():
    found = comparison.best_rates(results.read(comparison.RESULTS / "compare.jsonl")["results"])
    defaults = {name: method.learning_rate for name, method in METHODS.items()}
    assert {name: defaults[name] for name in found} == {
        name: comparison.default_rate(best) for name, best in found.items()
    }
    others = {name for name in METHODS if name not in found}
    assert {name for name in others if METHODS[name].finds_step} == {
        name for name in others if defaults[name] == 1 and name not in comparison.OTHER_DEFAULTS
    }
    of_optax = {name for name in others if name.startswith("optax_")}
    assert all(defaults[name] == defaults[name.removeprefix("optax_")] for name in of_optax)
    assert (defaults["adam"], defaults["sgd"]) == (defaults["adamw"], defaults["lomo"])


def test_the_best_rate_is_that_of_default_options_and_finished_searches():
    searched = [
        run("muon", rate, rate=r, tuned=False, options={"beta": beta})
        for rate, r, beta in ((1.8, 0.02, 0.95), (1.9, 0.01, 0.95), (1.7, 0.03, 0.9))
    ]
    assert comparison.best_rates(searched) == {}
    found = comparison.best_rates([*searched, *seeds("muon", 1.5)])
    assert found == {"muon": {"2M": 0.02}}


def test_how_many_rows_are_finished_is_said():
    said = comparison.progress({"results": [*RUNS, *seeds("lion", 1.9)]})
    assert said == (
        f"With 0.5M parameters 1 of {len(ROWS)} rows are finished. "
        f"With 2M parameters 3 of {len(ROWS)} rows are finished; "
        "fewer seeds: lion; soap, state int8.\n"
    )


def test_each_row_is_planned_at_its_tuned_setting_or_where_its_search_starts():
    protocol = PRESETS["cpu"]
    parameters = count_parameters(protocol.models["2M"])
    tuned = seeds("galore", 1.8, 1.82, options={"refresh_every": 50}, parameters=parameters)
    found = [compare_peaks.name(step) for step in compare_peaks.steps(tuned)]
    assert [(one["size"], one["method"]) for one in found] == [
        (size, name) for size in protocol.models for name in ROWS
    ]
    options = {one["size"]: one["options"] for one in found if one["method"] == "galore"}
    assert options == {"0.5M": {"refresh_every": 200}, "2M": {"refresh_every": 50}}
    assert compare_peaks.find(found, tuned[0]) == found[len(ROWS) + ROWS.index("galore")]


def test_runs_of_two_protocols_are_refused():
    with pytest.raises(ValueError, match="one protocol, got two of 2M"):
        comparison.by_method([*seeds("adamw", 2.0), *seeds("adamw", 2.0, steps=200)])


def test_a_file_of_runs_says_how_they_were_made(tmp_path):
    machine = {"cpu": "abacus", "cores": 1, "device": "cpu"}
    runs = [dict(one, machine=machine) for one in RUNS]
    runs.append(dict(runs[0], command="memopt compare --jobs 2"))
    (tmp_path / "compare.jsonl").write_text("".join(json.dumps(one) + "\n" for one in runs))
    report = results.read(tmp_path / "compare.jsonl")
    assert report["results"] == runs
    assert report["command"] == "memopt compare and memopt compare --jobs 2"
    assert "abacus, 1 cores; jax 0.10" in results.provenance(tmp_path / "compare.jsonl")
