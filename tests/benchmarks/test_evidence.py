"""The table of all methods: their papers' claims beside what was measured."""

from benchmarks import evidence
from memopt.optimizers.registry import METHODS, available
from tests.comparison.synthetic import seeds

RUNS = [
    *seeds("adamw", 2.0, 2.02, 1.98),
    *seeds("muon", 1.5, 1.52, 1.48),
    *seeds("lion", 2.5, 2.52, 2.48),
    *seeds("lomo", 2.5, 2.52, 2.48),
]
TRAFFIC = [
    {"optimizer": "lion", "layout": "stacked", "dtype": "float32", "traffic": 5.04},
    {"optimizer": "muon", "layout": "list", "dtype": "float32", "traffic": 9.0},
]


def test_every_method_has_a_claim_and_no_other():
    assert set(evidence.CLAIMS) == set(available("memopt"))


def test_each_method_has_its_state_traffic_claim_loss_and_use():
    head, _, *rows = (
        line.strip("| ").split(" | ")
        for line in evidence.table({"results": TRAFFIC}, {"results": RUNS}).splitlines()
    )
    assert head[4] == "2M: − adamw, p < 0.01"
    found = {row[0]: row for row in rows}
    claim = evidence.CLAIMS["lion"].text
    assert found["`lion`"][1:] == ["mn", "5.0", claim, "+0.50, worse", METHODS["lion"].when]
    assert found["`muon`"][2] == "–"
    assert found["`muon`"][4] == "-0.50, better"
    assert found["`soap`"][4] == "–"


def test_methods_that_do_not_match_others_as_claimed_are_named():
    rmnp = [*seeds("rmnp", 1.9, 1.92, 1.88), *seeds("normuon", 1.5, 1.52, 1.48)]
    assert evidence.not_confirmed({"results": [*RUNS, *rmnp]}) == (
        "Losses higher than the papers claim: `lion` against `adamw` (2M: +0.50), "
        "`rmnp` against `muon` (2M: +0.40).\n"
    )
    assert "claim: none." in evidence.not_confirmed({"results": RUNS[:6]})
