"""Plans: the compiler's figures of the very step that runs, of presets and of other models."""

import json
import shlex

import jax
import jax.numpy as jnp
import optax
import pytest
from rich.console import Console

import memopt
from memopt.cli.pretrain import parse
from memopt.models import StackedModel, llama
from memopt.planning import cache, chips
from memopt.planning import plan as planning
from memopt.planning.buffers import absolute
from memopt.planning.own_step import own_step
from memopt.planning.plan import Plan, plan, plan_step, roomiest
from memopt.planning.run_options import run_command, run_config
from memopt.planning.step_memory import bytes_here
from memopt.training.config import Config
from memopt.training.describe import describe_run
from memopt.training.directory import choose_directory
from memopt.training.loop import train
from memopt.training.open import open_run
from tests.training import nano

SHAPES = llama.abstract_params(nano.NANO)
PARTS = ("parameter", "state", "gradient", "activation", "temporary")


@pytest.fixture(autouse=True, scope="module")
def preset():
    nano.install()
    yield
    nano.remove()


@pytest.fixture(scope="module")
def lines():
    """JAX records where operations were written, which other tests do without."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 10)
    jax.clear_caches()
    yield
    jax.config.update("jax_traceback_in_locations_limit", before)


@pytest.fixture(scope="module")
def ordinary(lines):
    return plan("nano", optimizer="adamw", chip="cpu", seq_len=8)


@pytest.fixture(scope="module")
def released(lines):
    return plan("nano", optimizer="adamw", chip="cpu", seq_len=8, release=True)


def refusal(*args):
    raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (27.50G) exceeds available HBM (15.75G).\nSee more."
    )


def on_cpu(monkeypatch):
    """Lets a plan for any chip compile for the CPU, under the chip's name."""
    monkeypatch.setattr(chips, "devices", lambda chip, count: jax.devices()[:count])
    monkeypatch.setattr(chips, "compiler", lambda chip: f"compiler of {chip}")


def peak_of(compiled):
    memory = compiled.memory_analysis()
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return taken - memory.alias_size_in_bytes


def test_the_peak_is_that_of_the_step_of_a_run(tmp_path):
    found = plan("nano", optimizer="adafactor", chip="cpu", seq_len=32)
    data, output = nano.write_text(tmp_path / "words.txt", words=4000), tmp_path / "run"
    files = ["--data", str(data), "--output", str(output), "--steps", "1", "--eval-tokens", "64"]
    run = open_run(parse([*shlex.split(found.command)[2:], "--mesh", "data=1", *files]))
    _, compiled = train(run, Console(quiet=True))
    assert found.peak_bytes == peak_of(compiled)
    assert found.parameter_bytes == bytes_here(run.setup.state.params)
    assert found.state_bytes == bytes_here(run.setup.state.opt_state)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "lion", "mesh": "data=2,fsdp=2", "batch_size": 8, "accumulation": 2},
        {"optimizer": "lion", "release": True},
        pytest.param(
            {"optimizer": "apollo_mini", "release": True, "weights": "int8", "state": "int8"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ordinary", "released", "quantised"],
)
def test_the_peak_is_that_of_the_step_that_the_command_compiles(options):
    found = plan("nano", chip="cpu", seq_len=32, dtype="bfloat16", **options)
    config = parse(shlex.split(found.command)[2:])
    setup = describe_run(config, devices=jax.devices()[: found.devices])
    assert found.peak_bytes == peak_of(setup.compile())


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"optimizer": "adamw", "accumulation": 1}])
def test_of_a_run_it_plans_and_prints_the_step_that_starts_from_it(tmp_path, given):
    options = {"model": "nano", "seq_len": 16, "batch_size": 4, "accumulation": 2}
    options |= {"optimizer": "lion", "release": True, "state": "int8", "option": ["b1=0.8"]}
    options |= {"weights": "int8", "remat": "dots", "tokenizer": "bytes", "mesh": "data=2"}
    (tmp_path / "config.json").write_text(json.dumps(Config.from_flat(options).flat()))
    found = plan(str(tmp_path), chip="cpu", **given)
    name = given.get("optimizer", "lion")
    more = "" if not given else " --optimizer adamw --accumulation 1"
    assert (found.optimizer, found.devices) == (name, 2)
    assert found.command == f"memopt pretrain --init {tmp_path}{more}"
    config = parse(shlex.split(found.command)[2:])
    assert config.flat()["option"] == ([] if given else ["b1=0.8"])
    setup = describe_run(config, devices=jax.devices()[:2])
    assert found.peak_bytes == peak_of(setup.compile())


def test_options_given_over_those_of_a_run_are_printed(tmp_path):
    options = {"model": "nano", "optimizer": "lion", "option": ["b1=0.8", "b2=0.9"], "seq_len": 16}
    (tmp_path / "config.json").write_text(json.dumps(Config.from_flat(options).flat()))
    given = {"option": ("b2=0.95",), "learning_rate": 0.5, "data": ("a=x", "b=y"), "seq_len": 8}
    config = run_config(str(tmp_path), None, given, "v5e")
    command = run_command(config, str(tmp_path))
    assert "--option b2=0.95" in command
    assert "b1" not in command
    assert parse(shlex.split(command)[2:]).flat() == config.flat() | {
        "init": str(tmp_path),
    }


def test_the_devices_of_a_cpu_share_its_memory(ordinary):
    found = plan("nano", optimizer="adamw", chip="cpu", seq_len=8, mesh="data=2")
    assert found.limit_bytes == ordinary.limit_bytes // 2


def test_the_parts_add_up_to_the_peak(ordinary, released):
    for found in (ordinary, released):
        sizes = [getattr(found, f"{part}_bytes") for part in PARTS]
        assert sum(sizes) == found.peak_bytes
        assert min(sizes) >= 0
        assert found.fits
        assert found.margin_bytes == found.limit_bytes - found.peak_bytes
    size = 4 * sum(x.size for x in jax.tree.leaves(SHAPES))
    assert ordinary.parameter_bytes == size
    assert 2 * size <= ordinary.state_bytes < 2.01 * size


def test_gradients_are_all_there_or_those_of_a_block(ordinary, released):
    assert ordinary.gradient_bytes > 0.9 * ordinary.parameter_bytes
    assert 0 < released.gradient_bytes < ordinary.gradient_bytes / 2


def test_memory_over_time_has_the_peak(ordinary, released):
    for found in (ordinary, released):
        temporaries = found.peak_bytes - found.parameter_bytes - found.state_bytes
        most = max(found.over_time, key=sum)
        assert sum(most) <= temporaries
        assert (found.gradient_bytes, found.activation_bytes) == most[:2]
        assert sum(one.bytes for one in found.largest) <= sum(most)
        assert 20 < len(found.over_time) <= 200


def test_over_time_all_gradients_are_held_or_those_of_a_block(ordinary, released):
    most = [max(one.gradient_bytes for one in found.over_time) for found in (ordinary, released)]
    block = sum(4 * x.size // x.shape[0] for x in jax.tree.leaves(SHAPES["blocks"]))
    assert most[0] > 0.9 * ordinary.parameter_bytes
    assert block / 2 < most[1] <= block + 4 * SHAPES["embed"]["embedding"].size


def test_the_largest_temporaries_name_their_lines(ordinary):
    sizes = [one.bytes for one in ordinary.largest]
    assert len(sizes) == 5
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) <= ordinary.peak_bytes - ordinary.parameter_bytes - ordinary.state_bytes
    sources = [one.source for one in ordinary.largest if one.source]
    assert sources
    for source in sources:
        file, line = source.split(":")
        assert file.startswith("memopt/")
        assert len(absolute(file).read_text().splitlines()) >= int(line)


def test_a_plan_is_json(ordinary):
    there = json.loads(json.dumps(ordinary.to_json()))
    assert {"peak_bytes", "parameter_bytes", "state_bytes", "fits", "chip"} <= set(there)
    assert there["traffic_bytes"] > there["parameter_bytes"]
    assert there["collectives"] == {}


def test_an_optimizer_without_a_name_is_planned_like_one_with_it(ordinary):
    given = memopt.optimizer("adamw", optax.constant_schedule(1e-3))
    found = plan("nano", optimizer=given, chip="cpu", seq_len=8)
    assert found.optimizer == "own"
    assert found.command == ""
    assert found.state_bytes == ordinary.state_bytes
    assert abs(found.peak_bytes - ordinary.peak_bytes) < 0.01 * ordinary.peak_bytes


def test_of_a_hugging_face_directory_only_the_config_is_read(tmp_path, monkeypatch):
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    directory = tmp_path / "small"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(shape))
    config = run_config(str(directory), "lion", {"batch_size": 4}, "v5e")
    assert config.text.seq_len == 24  # as many as it accepts
    setup = describe_run(config, trace=False, devices=jax.devices()[:1])
    embedding = setup.state.params["embed"]["embedding"]
    assert (embedding.shape, embedding.dtype) == ((64, 16), jnp.bfloat16)
    command = run_command(config, str(directory))
    assert f"--init {directory}" in command
    assert "--model" not in command


def embed(rest, batch):
    return batch["x"] @ rest["in"]


def block(layer, x, batch):
    return x + jnp.tanh(x @ layer["kernel"])


def head(rest, x, batch):
    return jnp.sum((x @ rest["out"] - batch["y"]) ** 2), jnp.asarray(len(x))


def no_count(rest, x, batch):
    return head(rest, x, batch)[0]


MODEL = StackedModel(embed, block, head)
UNEVEN = {"x": jax.ShapeDtypeStruct((16, 64), "float32"), "y": jax.ShapeDtypeStruct((2,), "int32")}
OPTIONS = {"optimizer": "lion", "mesh": None, "release": False, "weights": None, "state": None}
OPTIONS |= {"remat": None, "accumulation": 1}


def own():
    """The shapes of a model that is no LLaMA, and of a batch."""
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")
    params = {"in": f32(64, 64), "blocks": {"kernel": f32(8, 64, 64)}, "out": f32(64, 1)}
    return params, {"x": f32(16, 64), "y": f32(16, 1)}


def test_a_model_of_ones_own_is_planned_in_both_steps():
    params, batch = own()
    tx = optax.adam(1e-3)
    ordinary, released = (
        plan_step(params, loss, batch, optimizer=tx, chip="cpu", release=release)
        for loss, release in ((MODEL.loss, False), (MODEL, True))
    )
    size = 4 * (64 * 64 + 8 * 64 * 64 + 64)
    for found in (ordinary, released):
        assert found.parameter_bytes == size
        assert found.state_bytes == 2 * size + 4
    assert released.peak_bytes < ordinary.peak_bytes


def test_a_batch_of_ones_own_has_as_many_rows_as_are_asked_for():
    params, batch = own()
    rows = lambda n: {"x": (n, 64), "y": (n, 1)}
    for size, wanted in ((None, 16), (6, 6)):
        make = own_step(params, MODEL, batch, **OPTIONS | {"batch_size": size})
        assert jax.tree.map(lambda x: x.shape, make(jax.devices()[:1], "cpu").batch) == rows(wanted)


def test_a_step_whose_weights_and_state_exceed_the_chip_is_not_compiled(monkeypatch):
    monkeypatch.setattr(planning, "memory_of", lambda chip, count: 1000)
    monkeypatch.setattr(planning, "compile_report", lambda *args: pytest.fail("compiled"))
    params, batch = own()
    found = plan_step(params, MODEL, batch, optimizer="lion", chip="cpu", skip_misfits=True)
    assert found.peak_bytes == found.parameter_bytes + found.state_bytes > 1000
    assert (found.fits, found.compiler, found.temporary_bytes) == (False, "", 0)
    assert found.margin_bytes == 1000 - found.peak_bytes
    assert "not compiled" in found.notes[0]


def test_an_optimizer_without_a_name_predicts_no_parameters_of_a_run(tmp_path):
    options = {"model": "nano", "optimizer": "sgd", "predict_steps": 2, "seq_len": 8}
    (tmp_path / "config.json").write_text(json.dumps(Config.from_flat(options).flat()))
    with pytest.raises(ValueError, match="predict_steps must be left out with an optimizer that"):
        plan(str(tmp_path), optimizer=optax.sgd(1.0), chip="cpu")


def test_a_function_of_a_module_names_an_optimizer_and_its_options():
    given = {"seq_len": 8, "option": ("b1=0.8",), "predict_steps": 2}
    config = run_config("nano", "optax:adamw", given, "cpu")
    setup = describe_run(config, trace=False, devices=jax.devices()[:1])
    named = describe_run(run_config("nano", "adamw", given, "cpu"), devices=jax.devices()[:1])
    assert jax.tree.map(lambda x: x.shape, setup.state) == jax.tree.map(
        lambda x: x.shape, named.state
    )
    assert run_command(config, "nano").startswith("memopt pretrain --model nano --optimizer optax:")
    assert choose_directory(config).name == "nano-optax-adamw"


def test_a_model_of_ones_own_is_split_as_its_leaves_say():
    params, batch = own()
    mesh = jax.sharding.AbstractMesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp"))
    split = jax.ShapeDtypeStruct((8, 64, 64), "float32", sharding=place)
    found = plan_step(
        params | {"blocks": {"kernel": split}},
        MODEL.loss,
        batch,
        optimizer="lion",
        chip="cpu",
        mesh="fsdp=2",
    )
    assert found.parameter_bytes == 4 * (64 * 64 + 4 * 64 * 64 + 64)
    assert found.collectives["all-gather"]["bytes"] > 0


def test_without_its_compiler_a_chip_is_planned_in_float32_on_the_cpu(monkeypatch):
    monkeypatch.setattr(
        chips, "_versions", lambda *names: ["jaxlib 1"] if "jaxlib" in names else []
    )
    found = plan("nano", chip="v5e", seq_len=16, dtype="bfloat16")
    assert found.compiled_for == "cpu"
    assert found.compiler.startswith("jaxlib")
    assert found.parameter_bytes == 4 * sum(x.size for x in jax.tree.leaves(SHAPES))
    assert found.limit_bytes == chips.CHIPS["v5e"].memory
    assert "pip install" in found.notes[0]
    assert "CPU instead" in found.notes[0]
    assert "float32" in found.notes[1]
    setup = describe_run(parse(shlex.split(found.command)[2:]), trace=False)
    assert bytes_here(setup.state.params) == found.parameter_bytes
    assert setup.model_config.dtype == "float32"


def test_a_step_that_its_compiler_refuses_is_compiled_for_a_roomier_chip(monkeypatch, ordinary):
    on_cpu(monkeypatch)
    chips_asked = []
    report = planning.compile_report
    monkeypatch.setattr(
        planning,
        "compile_report",
        lambda *args: (refusal if len(chips_asked) == 1 else report)(*args),
    )
    devices = chips.devices
    monkeypatch.setattr(
        chips, "devices", lambda chip, count: chips_asked.append(chip) or devices(chip, count)
    )
    found = plan("nano", optimizer="adamw", chip="v5e", seq_len=8, dtype="float32")
    assert chips_asked == ["v5e", "v5p"]
    assert (found.chip, found.compiled_for, found.fits) == ("v5e", "v5p", False)
    assert found.peak_bytes == ordinary.peak_bytes
    assert "total memory required for HLO temporaries (27.50G)" in found.notes[0]
    assert "compiled for v5p" in found.notes[1]


def test_a_step_that_no_chip_holds_needs_what_the_compiler_says(monkeypatch):
    on_cpu(monkeypatch)
    monkeypatch.setattr(planning, "compile_report", refusal)
    found = plan("nano", chip="v5e", seq_len=16)
    assert not found.fits
    assert found.peak_bytes == int(27.5 * 2**30)
    assert found.margin_bytes == found.limit_bytes - found.peak_bytes < 0
    assert "only the sum is known" in found.notes[1]


def test_the_roomiest_chip_is_of_the_same_kind():
    assert roomiest("v4") == "v5p"
    assert roomiest("rtx3090") in chips.GPUS


def test_the_same_question_is_answered_without_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params, batch = own()
    ask = lambda: plan_step(params, MODEL.loss, batch, chip="cpu", cache=True)
    first = ask()
    monkeypatch.setattr(planning, "compile_report", lambda *args: pytest.fail("compiled again"))
    assert ask() == first
    assert cache.directory().is_relative_to(tmp_path)


def test_jaxs_own_cache_of_programs_takes_no_record_away(tmp_path):
    options = {"jax_compilation_cache_dir": str(tmp_path), "jax_enable_compilation_cache": True}
    options |= {"jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in options}
    params, batch = own()
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        for _ in range(2):
            found = plan_step(params, MODEL.loss, batch, chip="cpu")
            assert found.optimizer == "apollo_mini"
            assert len(found.largest) == 5
        assert jax.config.jax_enable_compilation_cache
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nanoo"}, "model 'nanoo' is unknown; did you mean 'nano'"),
        ({"model": "nano", "chip": "v5"}, "chip 'v5' is unknown; did you mean 'v5p'|'v5e'"),
        ({"model": "nano", "optimizer": "adamx"}, "optimizer 'adamx' is unknown"),
        ({"model": "nano", "rank": 4}, "option 'rank' is unknown"),
        ({"model": "nano", "init": "nowhere"}, "option init must be left out"),
        ({"model": "nano", "seed": None}, "option seed must be left out"),
        ({"model": "nano", "optimizer": optax.sgd(1.0), "predict_steps": 2}, "predict_steps must"),
        ({"model": "nano", "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"model": "nano", "weights": "int5"}, "option weights must be"),
        ({"model": "nano", "mesh": "fsdp"}, "mesh 'fsdp' must name axes once and size them"),
        ({"model": "nano", "mesh": "fsdp=3", "batch_size": 2}, "does not divide its 2 rows"),
        ({"model": "nano", "optimizer": "muon", "release": True, "seq_len": 65}, "seq_len=65 is"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"chip": "cpu"} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"release": True}, "release needs a memopt.models.StackedModel"),
        ({"remat": "dots"}, "remat='dots' must be left out"),
        ({"accumulation": 3}, "accumulation=3 does not divide batch, which has 16 rows"),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"loss": lambda params, batch: MODEL.loss(params, batch)[0]}, "loss must return"),
        ({"loss": lambda params, batch: batch["x"]}, "loss must return"),
        ({"loss": StackedModel(embed, block, no_count), "release": True}, "head must return"),
        ({"loss": lambda params, batch: batch["z"]}, r"loss fails .*\(16, 64\), \(16, 1\) \(KeyE"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8, "batch": UNEVEN}, "batch_size=8 needs a batch .* of rows, got 2, 16"),
    ],
)
def test_what_a_model_of_ones_own_decides_is_no_option(options, message):
    params, batch = own()
    with pytest.raises(ValueError, match=message):
        plan_step(params, **{"loss": MODEL.loss, "batch": batch, "chip": "cpu"} | options)


def test_memopt_has_the_functions():
    assert memopt.plan is plan
    assert memopt.plan_step is plan_step


def test_defaults_are_those_of_the_function_and_not_of_a_run():
    config = run_config("nano", "lion", {"mesh": "data=2,fsdp=2", "accumulation": 3}, "v5e")
    assert config.text.batch_size == 12
    assert config.architecture.remat == "full"
    assert config.architecture.compute_dtype == config.architecture.param_dtype == "bfloat16"
    assert config.optimization.optimizer == "lion"
    assert config.text.seq_len == 64  # of at most 2048 that nano accepts


@pytest.mark.tpu
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_a_tpus_compiler_names_what_it_holds(chip, lines):
    found = plan("tiny", optimizer="adamw", chip=chip, mesh="fsdp=2", seq_len=256, batch_size=64)
    check(found, chip)
    assert found.traffic_bytes > found.parameter_bytes
    assert found.program_bytes > 0


@pytest.mark.tpu
def test_a_tpus_compiler_refuses_what_is_too_large():
    found = plan("350m", optimizer="lion", batch_size=64, num_layers=4, remat="none")
    assert found.compiled_for == "v5p"
    assert not found.fits
    assert found.peak_bytes > found.limit_bytes


@pytest.mark.tpu
@pytest.mark.parametrize(("optimizer", "state"), [("adafactor", None), ("apollo_mini", "int8")])
def test_an_ordinary_step_on_a_tpu_holds_gradients_once(optimizer, state):
    found = plan(
        "7b",
        optimizer=optimizer,
        state=state,
        chip="v5p",
        num_layers=4,
        vocab_size=256,
        seq_len=128,
    )
    assert found.peak_bytes - found.state_bytes < 2.2 * found.parameter_bytes


@pytest.mark.gpu
def test_a_gpus_compiler_names_what_it_holds(lines):
    found = plan("tiny", optimizer="adamw", chip="rtx4090", mesh="fsdp=2", seq_len=256)
    check(found, "rtx4090")
    assert found.traffic_bytes is None
    assert "cuDNN" in found.notes[0]


def check(found: Plan, chip: str) -> None:
    assert found.compiled_for == chip
    assert found.fits
    assert sum(getattr(found, f"{part}_bytes") for part in PARTS) == found.peak_bytes
    assert found.activation_bytes > 0  # most of a tiny model is in a v5e's fast memory
    assert any(one.source.startswith("memopt/") for one in found.largest)
    assert found.collectives["all-gather"]["bytes"] > found.parameter_bytes
