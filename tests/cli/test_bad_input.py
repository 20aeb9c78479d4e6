"""Bad input ends the command at once: one sentence on stderr, exit code 2, no traceback."""

import json
import sys

import pytest

from memopt.cli.main import main
from tests.training import nano


@pytest.fixture(autouse=True)
def nano_preset():
    nano.install()
    yield
    nano.remove()


@pytest.fixture
def complain(monkeypatch, capfd, tmp_path):
    """Runs `memopt` with arguments and returns what it says on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["memopt", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        return capfd.readouterr().err

    return run


@pytest.fixture
def pretrain(complain, tmp_path):
    text = nano.write_text(tmp_path / "words.txt")

    def run(*arguments):
        defaults = ("--model=nano", "--data", text, "--batch-size=8", "--seq-len=32", "--steps=2")
        complaint = complain("pretrain", *defaults, *arguments)
        assert complaint.startswith("memopt: ")
        assert complaint.count("\n") == 1
        assert not (tmp_path / "runs").exists()
        return complaint

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model=tinny"], "did you mean 'tiny'?"),
        (["--optimizer=apolo"], "did you mean 'apollo'?"),
        (["--optimizer=AdamW"], "did you mean 'adamw'?"),
        (["--schedule=cosin"], "did you mean 'cosine'?"),
        (["--schedule=cosine_with_restarts"], "unknown; did you mean 'restarts'?"),
        (["--schedule=wsd", "--schedule-option=dekay=3"], "option of wsd: 'dekay' is unknown"),
        (["--schedule=wsd", "--schedule-option=decay_steps=3"], "decay_steps is given as --decay"),
        (["--schedule=restarts", "--schedule-option=cycles"], "must be NAME=VALUE, such as cycles"),
        (["--schedule=restarts", "--schedule-option=cycles=x"], "must be a number, got 'x'"),
        (["--schedule-option=cycles=3"], "schedule 'cosine' has no options, got cycles=3"),
        (["--option=rnk=2"], "did you mean 'rank'?"),
        (["--option=rank"], "must be NAME=VALUE"),
        (["--optimizer=apollo", "--option=rank=64"], "rank"),
        (["--optimizer=apollo", "--option=rank=x"], "rank: the rank r of the subspace, a whole"),
        (["--optimizer=adamw", "--option=nesterov=false"], "nor True, False or None; nesterov: "),
        (["--optimizer=apollo", "--option=b1=(1,)"], "'apollo' cannot work with option b1=(1,)"),
        (["--optimizer=mkor", "--release"], "'mkor' needs statistics"),
        (["--optimizer=tag", "--option=tasks=3"], "task, the number of the current one of 3"),
        (["--param-dtype=float16"], "param_dtype must be float32 or bfloat16, got float16"),
        (["--compute-dtype=float16"], "since the loss is not scaled"),
        (["--compute-dtype=float"], "did you mean 'float32'?"),
        (
            ["--release", "--weights=int8", "--optimizer=optax_lars"],
            "optimizer 'optax_lars' cannot work like this: the update of",
        ),
        (["--release", "--optimizer=prodigy"], "but the gradients are never held together here"),
        (["--optimizer=schedule_free", "--state=int8"], "state=int8 must be left out"),
        (["--data=nowhere/*.txt"], "matches no text file"),
        (["--data=empty.txt"], "empty"),
        (["--data=bad.jsonl"], "bad.jsonl, line 1 is not JSON"),
        (["--data=half.jsonl", "--bad-records=stop"], "half.jsonl, line 2 is not JSON"),
        (["--tokenizer=nowhere.json"], "neither 'bytes' nor an existing tokenizer.json"),
        (["--vocab-size=100"], "add --vocab-size 257"),
        (["--vocab-size=0"], "vocab_size must be at least 1"),
        (["--seq-len=65"], "choose a shorter --seq-len"),
        (["--mesh=data=3"], "does not divide its 8 rows"),
        (["--mesh=data=4,fsdp=4"], "needs 16 devices, but there are 8"),
        (["--mesh=data"], "must name axes once and size them"),
        (["--mesh=rows=2"], "Mesh axis 'rows' is unknown"),
        (["--mesh=tensor=8"], "choose a mesh whose size divides it"),
        (["--processes=2"], "coordinator, processes and process go together"),
        (["--batch-size=0"], "batch_size must be at least 1"),
        (["--accumulation=3"], "accumulation=3 does not divide batch_size=8"),
        (["--steps=0"], "steps must be at least 1"),
        (["--warmup=2"], "warmup must be between 0 and 1"),
        (["--rewarm=0.1"], "it goes with --resume and --schedule NAME"),
        (["--learning-rate=-1"], "learning_rate must be at least 0"),
        (["--learning-rate=nan"], "learning_rate must be at least 0"),
        (["--eval-every=0"], "eval_every must be at least 1"),
        (["--eval-tokens=8"], "eval_tokens must be at least 32"),
        (["--seed=-1"], "seed=-1 must be between"),
        (["--output=words.txt"], "is taken"),
        (["--output=words.txt/run"], "cannot be written"),
        (["--output=full"], "is taken: continue the run in it with --resume"),
        (["--resume"], "there is no run to resume in"),
        (["--resume", "--output=full"], "there is no run to resume in 'full'"),
        (["--init=full"], "init 'full' is neither the directory of a run nor that of a Hugging"),
        (["--grow=2"], "grow and carry_state go with --init"),
        (["--resume", "--init=full"], "leave one out"),
        (["--config=nowhere.json"], "config 'nowhere.json' cannot be read"),
        (["--config=list.json"], "must hold a JSON object"),
        (["--config=wrong.json"], "option steps must be int, got 'many'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_sentence_says_what_to_change(pretrain, tmp_path, arguments, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "wrong.json").write_text('{"steps": "many"}')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text("{torn\n")
    (tmp_path / "half.jsonl").write_text('{"text": "good"}\n{torn\n')
    assert says in pretrain(*arguments)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_a_run_is_not_written_over(pretrain, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "is taken" in pretrain("--output=run")
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_resuming_with_another_optimizer_says_what_differs(pretrain, tmp_path):
    (tmp_path / "run").mkdir()
    options = {"model": "nano", "optimizer": "adamw", "option": ["weight_decay=0.1"]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(options))
    complaint = pretrain("--resume", "--output=run", "--optimizer=lion")
    assert "optimizer is 'adamw' there and 'lion' here" in complaint


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["train-tokenizer"],
            "command 'train-tokenizer' is unknown; did you mean 'tokenizer train'?",
        ),
        (["Pretain", "--steps=3"], "did you mean 'pretrain'?"),
        (["tokenizer", "tarin"], "did you mean 'tokenizer train'?"),
        (["--verbose"], "command '--verbose' is unknown. Allowed: pretrain, "),
        (["tokenizer", "train", "--output=t", "--data", "nowhere"], "matches no text file"),
        (["tokenizer", "train", "--output=t", "--vocab-size=9"], "vocab_size=9 is too small"),
        (["optimizers", "Lyon"], "did you mean 'lion'?"),
        (["controllers", "autolr"], "did you mean 'autolrs'?"),
        (["pretrain", "--stpes", "3"], "--steps"),
        (["pretrain", "--lr", "3"], "option --lr is unknown; did you mean --learning-rate?"),
        (["pretrain", "--batch=3"], "option --batch is unknown; did you mean --batch-size?"),
        (["pretrain", "--weight_decay=1"], "did you mean --option weight_decay=0.1?"),
        (["pretrain", "--steps=many"], "--steps"),
    ],
)
def test_other_mistakes(complain, arguments, says):
    complaint = complain(*arguments)
    assert says in complaint
    assert "Traceback" not in complaint
