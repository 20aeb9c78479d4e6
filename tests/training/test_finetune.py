"""Fine-tuning: the loop, the files and the options of `memopt finetune`."""

import json
import math

import chex
import pytest
from rich.console import Console

from benchmarks import exact_answers
from memopt.cli.finetune import parse_finetune
from memopt.cli.pretrain import parse
from memopt.training.directory import TEMPLATE
from memopt.training.loop import train
from memopt.training.metrics import read_metrics
from memopt.training.open import open_run
from memopt.training.report import sample_text

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A hundred sums."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}+1"},
                {"role": "assistant", "content": f"{i + 1}"},
            ]
        }
        for i in range(100)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(chats, tmp_path):
    """The options of a run on them, with others, as `memopt finetune` takes them."""
    fixed = f"--model=nano --data {chats} --output={tmp_path / 'run'} --mesh=data=1 --seq-len=64"
    fixed += " --eval-tokens=640 --optimizer=adamw --learning-rate=3e-3 --checkpoint-every=4"
    return lambda *more: parse_finetune([*fixed.split(), *more])


def test_epochs_decide_the_steps_and_the_loss_is_of_the_answers(options, tmp_path):
    run = open_run(options("--epochs=2"))
    steps, rows = run.config.optimization.steps, int(run.examples.split(" rows of ")[0].split()[-1])
    assert steps == math.ceil(2 * rows / 8)
    assert run.config.phases[0].steps == steps
    train(run, QUIET)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert "val_loss" in lines[-1]
    learned = sum(len(f"{i + 1}") + 1 for i in range(100))
    assert sum(line["tokens"] for line in lines) < 2.2 * learned


def test_a_stopped_run_goes_on_exactly_with_its_own_template(options, tmp_path, chats):
    template = tmp_path / "mine.jinja"
    source = "{% for m in messages %}{{ eos_token }}{{ m.role }}: {{ m.content }}{% endfor %}"
    end = "{{ eos_token }}{% if add_generation_prompt %}assistant: {% endif %}"
    template.write_text(source + end)
    given = [f"--chat-template={template}", "--steps=8"]
    whole, _ = train(open_run(options(*given, f"--output={tmp_path / 'whole'}")), QUIET)
    train(open_run(options(*given)), QUIET)
    kept = tmp_path / "run" / "checkpoints" / "8"
    kept.rename(tmp_path / "8")  # as if it had been killed after step 4
    template.unlink()
    run = open_run(parse_finetune(["--resume", f"--output={tmp_path / 'run'}"]))
    assert (tmp_path / "run" / TEMPLATE).read_text().startswith(source)
    assert int(run.state.step) == 4
    assert run.config.text.format == "chats"
    chex.assert_trees_all_equal(train(run, QUIET)[0], whole)


def test_more_epochs_lengthen_a_resumed_run(options, tmp_path):
    train(open_run(options("--epochs=1")), QUIET)
    resumed = open_run(parse_finetune(["--resume", f"--output={tmp_path / 'run'}", "--epochs=2"]))
    assert resumed.config.optimization.steps == pytest.approx(2 * int(resumed.state.step), abs=1)


def test_a_run_of_memopt_pretrain_is_fine_tuned_and_keeps_nothing_of_its_data(
    options, tmp_path, text
):
    flags = f"--model=nano --data {text} --seq-len=32 --steps=2 --mesh=data=1 --eval-tokens=64"
    flags += f" --optimizer=lion --param-dtype=bfloat16 --output={tmp_path / 'first'}"
    first, _ = train(open_run(parse(flags.split())), QUIET)
    config = options(f"--init={tmp_path / 'first'}")
    assert (config.text.data, config.optimization.optimizer) == (options().text.data, "adamw")
    assert config.architecture.param_dtype == "bfloat16"
    run = open_run(config)
    chex.assert_trees_all_equal(run.state.params, first.params)
    assert run.config.phases[0].steps == run.config.optimization.steps != 2
    run.checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--release", "--weights=int8", "--weights=int4 --release --state=int8", "--mesh=data=2"],
)
def test_chats_are_learned_in_less_memory_and_on_a_mesh(options, tmp_path, flags):
    optimizer = ["--optimizer=apollo_mini", "--learning-rate=1e-2"]
    train(open_run(options("--steps=30", *optimizer, *flags.split())), QUIET)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["val_loss"] < lines[0]["loss"] - 1


def test_evaluation_data_of_its_own_leaves_all_of_the_data_to_training(options, chats):
    run = open_run(options(f"--eval-data={chats}"))
    assert run.examples.startswith("100 examples")
    learned = sum(int(batch["weights"].sum()) for batch in run.validation)
    assert learned == sum(len(f"{i + 1}") + 1 for i in range(100))
    run.checkpoints.close()
    run.batches.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=3", "--epochs=2"], "steps and epochs both say how long"),
        (["--epochs=0"], "epochs must be positive, got 0.0"),
        (["--format=text"], "epochs must be left out with text"),
        (["--chat-template=none.jinja"], "chat_template 'none.jinja' cannot be read: No such file"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_written(
    options, tmp_path, flags, message
):
    with pytest.raises(ValueError, match=message):
        open_run(options(*flags))
    assert not (tmp_path / "run").exists()


def test_without_data_there_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="data is empty: name a file"):
        open_run(parse_finetune(["--model=nano", f"--output={tmp_path / 'run'}", "--seq-len=64"]))


def test_the_sample_is_an_answer_to_a_held_out_prompt(options):
    run = open_run(options("--epochs=1"))
    state, _ = train(run, QUIET)
    prompt, continuation = sample_text(run, state.params, new_tokens=8)
    assert prompt.startswith("user\n")
    assert prompt.endswith("+1assistant\n")
    assert isinstance(continuation, str)


def test_five_prompts_are_answered_exactly(tmp_path):
    options = exact_answers.Options(
        prompts=5, model="nano", learning_rate=2e-2, epochs=150, every=10**6
    )
    curve, generated = exact_answers.learn(options, tmp_path, QUIET)
    assert curve[-1][2] == generated == 5


@pytest.mark.slow
def test_a_hundred_prompts_are_answered_exactly(tmp_path):
    curve, generated = exact_answers.learn(exact_answers.Options(), tmp_path, QUIET)
    assert curve[0][2] == 0
    assert curve[-1][2] == generated == 100
