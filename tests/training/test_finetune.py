"""Fine-tuning: the loop, the files and the options of `memopt finetune`."""

import dataclasses
import json
import math
import re
import shutil

import chex
import pytest
from rich.console import Console

from benchmarks import exact_answers
from memopt.cli.finetune import parse_finetune
from memopt.cli.pretrain import _introduce, parse
from memopt.json_lines import read_json_lines
from memopt.text.tokenizer import TEMPLATE
from memopt.training.load import load_run
from memopt.training.loop import train
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


@pytest.fixture(scope="module")
def fixed(chats):
    """Options of a short run on them, as on the command line."""
    fixed = f"--model=nano --data {chats} --mesh=data=1 --seq-len=64 --eval-tokens=6400"
    return [*fixed.split(), "--optimizer=adamw", "--learning-rate=3e-3", "--checkpoint-every=5"]


@pytest.fixture
def options(fixed, tmp_path):
    """The options of such a run, with others, as `memopt finetune` takes them."""
    return lambda *more: parse_finetune([*fixed, f"--output={tmp_path / 'run'}", *more])


@pytest.fixture(scope="module")
def tuned(fixed, tmp_path_factory):
    """A run of two epochs with a template of its own, which is gone: its options and last state."""
    directory = tmp_path_factory.mktemp("tuned")
    template = directory / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ eos_token }}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{{ eos_token }}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    flags = [*fixed, f"--output={directory / 'run'}", "--epochs=2", f"--chat-template={template}"]
    run = open_run(parse_finetune(flags))
    state, _ = train(run, QUIET)
    template.rename(directory / "another name")
    return run, state


def resume(run, directory, *flags):
    """Resumes a copy of a run."""
    shutil.copytree(run.directory, directory)
    return open_run(parse_finetune(["--resume", f"--output={directory}", *flags]))


def test_epochs_decide_the_steps_and_the_loss_is_of_the_answers(tuned):
    run, _ = tuned
    steps, rows = run.config.optimization.steps, int(run.examples.split(" rows of ")[0].split()[-1])
    assert steps == math.ceil(2 * rows / 8) == run.config.phases[0].steps
    lines = read_json_lines(run.directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[-1]["val_loss"] < lines[0]["loss"]
    learned = sum(len(f"{i + 1}") + 1 for i in range(100))
    assert sum(line["tokens"] for line in lines) < 2.2 * learned


def test_a_killed_run_goes_on_exactly_with_the_template_it_had(tuned, tmp_path):
    before, last = tuned
    kept = (before.directory / TEMPLATE).read_text()
    shutil.copytree(before.directory, tmp_path / "run")
    for later in (tmp_path / "run" / "checkpoints").iterdir():
        if int(later.name) > 5:
            shutil.rmtree(later)
    run = open_run(parse_finetune(["--resume", f"--output={tmp_path / 'run'}"]))
    assert int(run.state.step) == 5
    assert run.config.text.format == "chats"
    assert kept.endswith("assistant: {% endif %}")
    chex.assert_trees_all_equal(train(run, QUIET)[0], last)


def test_more_epochs_lengthen_a_resumed_run(tuned, tmp_path):
    run = resume(tuned[0], tmp_path / "run", "--epochs=4")
    steps = tuned[0].config.optimization.steps
    assert run.config.optimization.steps == pytest.approx(2 * steps, abs=1)
    close(run)


def test_another_chat_template_is_refused_and_the_same_one_elsewhere_is_not(tuned, tmp_path):
    before, _ = tuned
    (tmp_path / "other.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    other = f"--chat-template={tmp_path / 'other.jinja'}"
    with pytest.raises(ValueError, match="cannot be resumed like this: data tokenizer is"):
        resume(before, tmp_path / "run", other)
    same = shutil.copy(before.directory / TEMPLATE, tmp_path / "same.jinja")
    close(resume(before, tmp_path / "again", f"--chat-template={same}"))


def test_a_run_is_fine_tuned_with_its_model_and_tokenizer_and_nothing_else(tuned, options):
    before, last = tuned
    config = options(f"--init={before.directory}", "--epochs=1", "--optimizer=lion")
    assert config.architecture == before.config.architecture
    assert config.text.format == "chats"
    run = open_run(config)
    template = (before.directory / TEMPLATE).read_text()
    assert (run.directory / TEMPLATE).read_text() == template
    chex.assert_trees_all_equal(run.state.params, last.params)
    assert run.config.phases[0].steps == run.config.optimization.steps < int(last.step)
    close(run)


def test_a_run_on_chats_may_be_followed_by_one_on_text(tuned):
    follows = parse([f"--init={tuned[0].directory}", "--format=text"])
    assert follows.text.chat_template is None
    again = parse([f"--init={tuned[0].directory}"])
    assert again.text.chat_template == str(tuned[0].directory / TEMPLATE)


def test_the_sample_is_an_answer_to_a_held_out_prompt(tuned):
    run, state = tuned
    prompt, continuation = sample_text(run, state.params, new_tokens=8)
    assert re.fullmatch(r"user: \d+\+1assistant: ", prompt)
    assert len(continuation) <= 8


def test_a_run_on_completions_continues_a_prompt(fixed, tmp_path):
    rows = [json.dumps({"prompt": f"{i}+1=", "completion": f"{i + 1}"}) for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))
    run = open_run(
        parse_finetune(
            [
                *fixed,
                f"--data={tmp_path / 'sums.jsonl'}",
                f"--output={tmp_path / 'run'}",
                "--steps=1",
            ]
        )
    )
    state, _ = train(run, QUIET)
    prompt, _ = sample_text(run, state.params, new_tokens=1)
    assert re.fullmatch(r"\d+\+1=", prompt)
    loaded = load_run(tmp_path / "run")
    assert (loaded.format, loaded.config.text.format, loaded.end_ids) == ("text", "chats", (256,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--release", "--weights=int8", "--weights=int4 --release --state=int8", "--mesh=data=2"],
)
def test_chats_are_learned_in_less_memory_and_on_a_mesh(options, tmp_path, flags):
    optimizer = ["--optimizer=apollo_mini", "--learning-rate=1e-2"]
    train(open_run(options("--steps=30", *optimizer, *flags.split())), QUIET)
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["val_loss"] < lines[0]["loss"] - 1


def test_evaluation_data_of_its_own_leaves_all_of_the_data_to_training(options, chats):
    run = open_run(options(f"--eval-data={chats}"))
    assert run.examples.startswith("100 examples")
    learned = sum(int(batch["weights"].sum()) for batch in run.validation[""])
    assert learned == sum(len(f"{i + 1}") + 1 for i in range(100))
    close(run)


def close(run):
    """Releases a run that is not trained."""
    run.checkpoints.close()
    run.batches.close()
    run.lock.close()


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


def test_a_model_must_be_named():
    with pytest.raises(ValueError, match="init must name the model to fine-tune"):
        parse_finetune(["--data=chats.jsonl"])


def test_rows_are_not_longer_than_the_context_unless_a_length_is_given(tuned):
    length = lambda *flags: parse_finetune([*flags, "--data=x"]).text.seq_len
    assert length("--model=nano") == length(f"--init={tuned[0].directory}") == 64
    assert length("--model=tiny") == 512
    assert length("--model=nano", "--seq_len=128") == 128
    assert parse(["--model=nano"]).text.seq_len == 64
    assert parse([]).text.seq_len == 128


def test_few_steps_are_warned_about_unless_they_are_given(options):
    run = open_run(options("--epochs=0.3"))
    steps = run.config.optimization.steps
    with pytest.warns(UserWarning, match=f"only {steps} steps: lower --batch-size or raise --ep"):
        _introduce(run, QUIET)
    _introduce(dataclasses.replace(run, config=options(f"--steps={steps}")), QUIET)
    close(run)


def test_five_prompts_are_answered_exactly(tmp_path):
    options = exact_answers.Options(
        prompts=5, model="nano", learning_rate=3e-2, epochs=240, every=10**6
    )
    curve, generated = exact_answers.learn(options, tmp_path, QUIET)
    assert curve[-1][2] == generated == 5


@pytest.mark.slow
def test_a_hundred_prompts_are_answered_exactly(tmp_path):
    curve, generated = exact_answers.learn(exact_answers.Options(), tmp_path, QUIET)
    assert curve[0][2] == 0
    assert curve[-1][2] == generated == 100
