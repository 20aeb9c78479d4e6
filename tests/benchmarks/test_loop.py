"""The command that measures the training loop works; no time is asserted."""

import json

import pytest

from benchmarks import loop


@pytest.mark.slow
def test_it_compares_the_loop_with_one_that_waits_for_each_step(tmp_path):
    output = tmp_path / "loop.json"
    loop.main(["--step-ms=0.5", "--steps=22", "--repeats=1", f"--output={output}"])
    results = json.loads(output.read_text())["results"]
    assert list(results) == ["synchronous", "now"]
    assert results["synchronous"]["waiting_milliseconds"] > 0
    for result in results.values():
        assert 0 <= result["share"] <= 1


def test_a_run_of_its_warm_up_alone_is_refused():
    with pytest.raises(SystemExit, match="steps must be at least 21, got 20"):
        loop.main(["--steps=20"])
