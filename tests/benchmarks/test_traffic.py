"""The command that asks the TPU's compiler for bytes; what compiles needs the extra `plan`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import memopt
from benchmarks import traffic
from memopt.planning import chips

HLO = """
HloModule jit_step

%fused (p: f32[8]) -> f32[8] {
  ROOT %copy.9 = f32[8]{0} copy(%p)
}

ENTRY %main (g: f32[4,256]) -> bf16[4,256] {
  %g = f32[4,256]{1,0:T(4,128)} parameter(0)
  %copy-start = (f32[4,256]{1,0:T(4,128)S(1)}, f32[4,256]{1,0}, u32[]{:S(2)}) copy-start(%g)
  %copy-done = f32[4,256]{1,0:T(4,128)S(1)} copy-done(%copy-start)
  %sum = (f32[4]{0:S(1)}, f32[4]{0}) fusion(%copy-done, /*index=1*/%g), calls=%fused
  ROOT %out = bf16[4,256]{1,0} convert(%g), metadata={op_name="jit(step)/cast" stack_frame_id=1}
}
"""


def test_only_what_goes_to_and_from_main_memory_counts() -> None:
    assert traffic.movers(HLO) == [
        (4096 + 2048, "convert bf16[4,256]  jit(step)/cast"),
        (4096 + 16, "fusion (f32[4], f32[4])  sum"),
        (4096, "copy-done f32[4,256]  copy-done"),
    ]


def test_the_rank_goes_to_methods_that_have_one() -> None:
    assert traffic.method_options("apollo", 32) == {"rank": 32}
    for name in ("apollo_mini", "adafactor", "adamw"):
        assert traffic.method_options(name, 32) == {}


def test_methods_that_refresh_or_evaluate_at_each_step_are_not_compared() -> None:
    compared = set(traffic.compared())
    assert set(memopt.available("memopt")) - compared == {"ldadam", "mkor", "oasis"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "lino"], "did you mean 'lion'"),
        (["--optimizer", "apollo", "--rank", "5000"], "rank must be between 1 and 4096"),
        (["--optimizer", "lion"], r"pip install 'memopt\[plan\]'"),
    ],
)
def test_bad_input_ends_with_one_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chips, "_versions", lambda *packages: [])
    with pytest.raises(SystemExit, match=message):
        traffic.main(arguments)


@pytest.mark.tpu
@pytest.mark.parametrize("layout", ["stacked", "list"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_optimizer_as_json(layout: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    traffic.main(
        f"--optimizer optax_lion --layout {layout} --dtype {dtype} --chip v5e --json".split()
    )
    record = json.loads(capsys.readouterr().out)
    assert record["traffic"] == pytest.approx(5, rel=1e-4)  # g, m and w read, m and w written
    size = 2 if dtype == "bfloat16" else 4
    assert record["parameter_bytes"] == 4 * size * (4 * 4096**2 + 3 * 4096 * 11008)


@pytest.mark.tpu
def test_a_list_is_written_with_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memopt, "available", lambda library: ("lion",))
    output = tmp_path / "results" / "traffic.json"
    traffic.main(["--output", str(output), "--explain"])
    results = json.loads(output.read_text())["results"]
    assert [r["optimizer"] for r in results] == [*traffic.BASELINES, "lion"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "fusion f32[4,4096,11008]" in capsys.readouterr().out


@pytest.mark.tpu
def test_no_refresh_is_counted() -> None:
    projector = memopt.projectors.gaussian(8, stored=True)
    tx = memopt.in_subspace(optax.identity(), projector, memopt.recombine.lift(), 200)
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    compiled = traffic.compile_step(tx, params, traffic.one_chip("v5e"))
    assert "conditional(" not in compiled.as_text()


@pytest.mark.tpu
def test_what_is_kept_in_fast_memory_counts_more_than_once() -> None:
    options = traffic.Options(layout="list", dtype="bfloat16")
    record, compiled = traffic.measure("adamw", options)
    assert record["traffic"] == pytest.approx(7, rel=1e-4)
    listed = sum(moved for moved, _ in traffic.movers(compiled.as_text()))
    assert listed == pytest.approx(record["bytes_accessed"], rel=1e-3)
    assert traffic.measure("adamw", options._replace(cache=True))[0]["traffic"] > 7.5
