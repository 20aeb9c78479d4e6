"""Compares methods and learning rates for fine-tuning on two small tasks.

    python -m benchmarks.finetune

Answers: the random model of ``benchmarks.exact_answers`` learns a hundred answers; the loss is that
of the same answers after the last step. Docstrings: a model is pretrained on one half of Python's
standard library, then learns to write the first line of a docstring after its function's head, from
the other half; the loss is that of held-out ones. Every method gets its own three learning rates.

Writes a JSON file, with the bytes of state for LLaMA-2-7b.
"""

import ast
import dataclasses
import itertools
import json
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

import memopt
from benchmarks.report import Report, markdown_table
from examples.capitals import chats
from memopt.cli.finetune import parse_finetune
from memopt.cli.pretrain import parse
from memopt.json_lines import read_json_lines
from memopt.models.llama import abstract_params, preset
from memopt.state.quantized_state import quantize_state
from memopt.text.tokenizer import train_tokenizer
from memopt.training.loop import train
from memopt.training.open import open_run

#: Options of each method, and the learning rates it is tried with.
METHODS = {
    "adamw": ("--optimizer adamw", (3e-4, 1e-3, 3e-3)),
    "muon": ("--optimizer muon", (3e-3, 1e-2, 3e-2)),
    "muon, int8 state": ("--optimizer muon --state int8", (3e-3, 1e-2, 3e-2)),
    "apollo_mini": ("--optimizer apollo_mini", (3e-3, 1e-2, 3e-2)),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        steps: steps of the first task.
        pretrained_steps: steps of the pretraining of the second task.
        functions: functions of the second task.
        output: the JSON file.
    """

    steps: int = 80
    pretrained_steps: int = 150
    functions: int = 400
    output: Path = Path(__file__).parent / "results" / "finetune.json"


TASKS = ("answers", "docstrings")


def docstrings(files: list[Path]) -> Iterator[dict[str, str]]:
    """Heads of functions, and the first line of their docstrings."""
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                head = f"def {node.name}({ast.unparse(node.args)}):\n"
                if len(head) < 100 and len(line := text.splitlines()[0]) < 100:
                    yield {"prompt": head, "completion": f'    """{line}'}


def last_loss(directory: Path, flags: str) -> float:
    """Fine-tunes, and returns the validation loss after the last step."""
    arguments = f"{flags} --output {directory} --eval-every 100000 --checkpoint-every 100000"
    train(open_run(parse_finetune(arguments.split())), Console(quiet=True))
    return read_json_lines(directory / "metrics.jsonl")[-1]["val_loss"]


def tasks(options: Options, home: Path) -> dict[str, str]:
    """Prepares the two tasks; returns the options of each."""
    answers = home / "answers.jsonl"
    conversations = chats()
    answers.write_text("\n".join(json.dumps({"messages": m}) for m in conversations) + "\n")
    texts = (message["content"] for messages in conversations for message in messages)
    vocabulary = train_tokenizer(texts, 1024, home / "answers")

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    known, new = home / "known", home / "docstrings.jsonl"
    known.mkdir()
    for file in files[::2]:
        (known / file.name).write_bytes(file.read_bytes())
    rows = itertools.islice(docstrings(files[1::2]), options.functions)
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = train_tokenizer((file.read_text() for file in files[::2]), 1024, home / "words")
    size = f"--model tiny --num-layers 2 --vocab-size {words.vocab_size}"
    flags = f"{size} --data {known} --tokenizer {words.name} --steps {options.pretrained_steps}"
    flags += f" --optimizer adamw --learning-rate 2e-3 --output {home / 'pretrained'}"
    train(open_run(parse(flags.split())), Console(quiet=True))
    return {
        "answers": (
            f"--data {answers} --eval-data {answers} --seq-len 64 --steps {options.steps} "
            f"--model tiny --num-layers 2 --vocab-size {vocabulary.vocab_size} "
            f"--tokenizer {vocabulary.name}"
        ),
        "docstrings": f"--init {home / 'pretrained'} --data {new} --seq-len 128 --epochs 2",
    }


def state_bytes(flags: str) -> int:
    """Bytes of state for LLaMA-2-7b."""
    _, name, *state = flags.replace("--state", "").split()
    tx = memopt.optimizer(name, learning_rate=1e-3)
    tx = quantize_state(tx, state[0]) if state else tx
    return memopt.state_bytes(tx, abstract_params(preset("llama-2-7b"))).total


def markdown(report: dict[str, Any]) -> str:
    """The table for the docs: each method at the best of its learning rates."""
    rows = []
    for method, r in report["results"].items():
        answers, heads = (min(r[task].items(), key=lambda at: at[1]) for task in TASKS)
        best = f"{answers[1]:.2g} at {answers[0]}", f"{heads[1]:.2f} at {heads[0]}"
        rows.append((method, f"{r['state_bytes_7b'] / 1e9:.1f} GB", *best))
    return markdown_table(("method", "state for LLaMA-2-7b", *TASKS), rows)


def main(options: Options) -> None:
    """Measures, prints and saves."""
    console = Console()
    results: dict[str, dict[str, Any]] = {}
    report = Report("finetune", (), options.output, results)
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        prepared = tasks(options, home)
        for method, (flags, rates) in METHODS.items():
            results[method] = {"state_bytes_7b": state_bytes(flags)}
            for task, given in prepared.items():
                losses = {}
                for rate in rates:
                    output = home / f"{task}-{method}-{rate:g}".replace(" ", "")
                    losses[f"{rate:g}"] = round(
                        last_loss(output, f"{given} {flags} --learning-rate {rate:g}"), 4
                    )
                results[method][task] = losses
                best = min(losses, key=losses.__getitem__)
                console.print(f"{method:20} {task:11} {losses[best]:.4f} at {best}  {losses}")
            report.save()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
