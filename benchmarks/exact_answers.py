"""Fine-tunes a tiny random model until it answers a hundred prompts exactly, and draws how it does.

    python -m benchmarks.exact_answers

The data, options and training step are those of ``memopt finetune``. An answer is exact if greedy
decoding gives it: if the likeliest token is the right one at each of its places. At the end all
answers are generated, too.
"""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from examples.capitals import chats, make
from memopt.cli.finetune import parse_finetune
from memopt.text.chats import ChatEncoder
from memopt.training.open import Training, open_run
from memopt.training.sampling import continuations


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of this benchmark.

    Attributes:
        prompts: how many prompts to learn, the first ones.
        model: the preset whose sizes the random model has.
        optimizer: the optimizer.
        learning_rate: the highest learning rate.
        epochs: passes over the prompts, at most.
        every: steps between two counts of exact answers.
        output: the plot.
    """

    prompts: int = 100
    model: str = "tiny"
    optimizer: str = "muon"
    learning_rate: float = 2e-2
    epochs: int = 40
    every: int = 4
    output: Path = Path(__file__).parent / "results" / "finetune.png"


def open_example(options: Options, directory: Path) -> Training:
    """The run that ``memopt finetune`` would start; the prompts are its validation set, too."""
    model, data = make(directory, options.prompts, options.model)
    flags = f"--init {model} --data {data} --eval-data {data} --output {directory / 'run'}"
    flags += f" --epochs {options.epochs} --learning-rate {options.learning_rate}"
    flags += f" --optimizer {options.optimizer} --batch-size 8 --seq-len 64"
    return open_run(parse_finetune(flags.split()))


def count_exact(run: Training, likeliest: Callable[[Any, Any], jax.Array], params: Any) -> int:
    """How many answers of the validation set greedy decoding gives exactly.

    Args:
        run: the run.
        likeliest: the model's likeliest next tokens, given parameters and a batch.
        params: the parameters.
    """
    exact = 0
    for batch in run.validation[""]:
        wrong = np.asarray(likeliest(params, run.setup.place(batch))) != batch["targets"]
        learned = batch["weights"] == 1
        rows = np.broadcast_to(np.arange(len(wrong))[:, None], wrong.shape)
        examples = lambda where: set(zip(rows[where], batch["segment_ids"][where], strict=True))  # noqa: B023
        exact += len(examples(learned)) - len(examples(learned & wrong))
    return exact


def answer(run: Training, params: Any, prompts: Sequence[list[dict[str, str]]]) -> list[str]:
    """Generates the answers to prompts, those of one length at a time."""
    with ChatEncoder(run.tokenizer) as encoder:
        ids = [encoder.prompt(prompt) for prompt in prompts]
    answers, model = [""] * len(ids), run.setup.model(params)
    for length in sorted(set(map(len, ids))):
        chosen = [i for i, prompt in enumerate(ids) if len(prompt) == length]
        stacked = np.stack([ids[i] for i in chosen])
        written = continuations(model, stacked, 24, end_ids=[run.tokenizer.eos_id])
        for i, row in zip(chosen, written, strict=True):
            answers[i] = run.tokenizer.decode(row)
    return answers


def learn(options: Options, directory: Path, console: Console) -> tuple[list[list[float]], int]:
    """Trains to the last epoch.

    Returns:
        Step, loss and exact answers now and then, and how many generated answers are exact.
    """
    run, curve = open_example(options, directory), []
    began, state = time.monotonic(), run.state
    steps = run.config.optimization.steps
    console.print(run.examples)
    with jax.set_mesh(run.setup.mesh), contextlib.closing(run.batches):
        likeliest = jax.jit(
            lambda params, batch: run.setup.model(params)(
                batch["inputs"], batch["segment_ids"], batch["positions"]
            ).argmax(-1)
        )
        for step in range(1, steps + 1):
            state, metrics = run.setup.jitted(state, next(run.batches))
            if step % options.every == 0 or step == steps:
                exact = count_exact(run, likeliest, state.params)
                curve.append([step, float(metrics["loss"]), exact])
                seconds = time.monotonic() - began
                console.print(
                    f"step {step:4}  loss {curve[-1][1]:.4f}  exact {exact}  {seconds:.0f} s"
                )
        conversations = chats(options.prompts)
        answers = answer(run, state.params, [messages[:1] for messages in conversations])
    run.lock.close()
    right = [messages[1]["content"] for messages in conversations]
    return curve, sum(map(str.__eq__, answers, right))


def plot(curve: list[list[float]], prompts: int, path: Path) -> None:
    """Draws exact answers and loss over the steps."""
    from matplotlib.figure import Figure

    steps, losses, exact = zip(*curve, strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, exact, "o-", ms=3, color="C0")
    axes.set(xlabel="step", ylim=(0, prompts * 1.05))
    axes.set_ylabel(f"exact answers of {prompts}", color="C0")
    right = axes.twinx()
    right.plot(steps, losses, lw=1, color="C1")
    right.set_yscale("log")
    right.set_ylabel("loss a learned token (nats)", color="C1")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(options: Options) -> None:
    """Learns, prints and draws."""
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        curve, generated = learn(options, Path(directory), console)
    console.print(f"{generated} of {options.prompts} generated answers are exact")
    plot(curve, options.prompts, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
