"""Our optimizers against runs recorded from the authors' own implementations."""

from pathlib import Path

import pytest

from tests.optimizers import recorded_runs
from tests.optimizers.kinds import slow_unless
from tests.yardstick import yardstick

BOTH = {  # in both orientations; `test_rederived` tries matrices of either shape
    *("adafactor_torch", "apollo", "frugal_svd", "galore", "lion"),
}
SLOW = {  # beside a quick run of the same method
    *("cautious_adamw_timm", "adamw_cwd_hb", "hyperball_adamw_hb"),
    *("adamw_amsgrad_torch", "adopt", "adopt_noclip", "lamb_timm", "lamb_timm_plain"),
    *("lamb_timm_decoupled", "lars_po", "lars_timm", "adafactor_hf_fixed", "adalomo_wd"),
    *("apollo_nozero", "apollo_gap10", "frugal_random", "galore_gap10", "galore_reverse"),
    *("coord_clip_sgd", "flora", "osd_sgd_nozero", "soap_maxdim64"),
    *("muon_fp32", "muon_pe_nv", "muon_pe_nv_5steps", "normuon_dion_fp32", "rmnp_llama", "scale"),
    *("came_official", "sinkgd_axolotl", "sinkgd_axolotl_l2", "sinkgd_naubull2"),
}


@pytest.mark.parametrize(
    ("run", "transpose"),
    [
        pytest.param(run, transpose, id=f"{run}-{name}", marks=slow_unless(quick))
        for run in recorded_runs.RUNS
        for transpose, name, quick in (
            (False, "out_in", run not in SLOW),
            (True, "in_out", run in BOTH),
        )
    ],
)
def test_equals_the_recorded_run(run, transpose):
    errors, tolerances = recorded_runs.errors(run, transpose), recorded_runs.tolerances(run)
    assert set(errors) == set(recorded_runs.recorded(run))
    for leaf, steps in errors.items():
        assert set(steps) == set(yardstick.SNAP)
        for step, error in steps.items():
            assert error <= tolerances[leaf][step], (leaf, step, error)


def test_every_recording_is_followed():
    assert set(recorded_runs.RUNS) == {p.stem for p in Path(yardstick.HERE, "ref").iterdir()}
