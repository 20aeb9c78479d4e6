r"""Evaluate the model of a run, or a Hugging Face model, on text.

Shows the loss a token and a byte. Models with different tokenizers are compared by bytes.

Examples:
  memopt evaluate runs/books
  memopt evaluate runs/books --data 'other/*.txt'
  memopt evaluate path/to/SmolLM-135M --data 'other/*.txt' --seq-len 1024
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro import conf

from memopt.cli.arguments import Step
from memopt.cli.errors import failing
from memopt.training.evaluation import evaluate_data, pooled
from memopt.training.load import load_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `memopt evaluate`.

    Attributes:
        run: Directory of a run or of a Hugging Face model.
        data: Text or chats, as in `memopt pretrain` and `finetune`, all of it; each source that is
            given as NAME=SOURCE has a line of its own. Without it, what the run held out, as much
            as its own validation reads.
        format: What the data holds: text, or chats, of which the answers count; by default as the
            run was trained, and text for a Hugging Face model.
        batch_size: Rows that are evaluated at a time.
        seq_len: Tokens of a row, which is what the model sees before a token, at most; by default
            that of the run, or the model's longest up to 1024.
    """

    run: Annotated[conf.Positional[Path], conf.arg(metavar="RUN")]
    data: Annotated[tuple[str, ...], conf.arg(metavar="SOURCE ...")] = ()
    format: Annotated[Literal["text", "chats"] | None, conf.arg(metavar="{text,chats}")] = None
    batch_size: int = 8
    seq_len: Annotated[int | None, conf.arg(metavar="INT")] = None
    step: Step = "best"


def evaluate(arguments: list[str]) -> None:
    """Runs `memopt evaluate` with these arguments."""
    options = tyro.cli(Options, prog="memopt evaluate", description=__doc__, args=arguments)
    with failing():
        loaded = load_model(options.run, options.step)
        sources = evaluate_data(
            loaded,
            options.data,
            format=options.format,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
        )
    found = pooled(sources.values())
    at_step = "" if loaded.step is None else f", step {loaded.step}"
    print(f"model      {loaded.path}{at_step}")
    name = " ".join(options.data) or "what the run held out"
    print(f"data       {name}: {found.tokens:,} tokens, {found.bytes:,} bytes")
    for source, own in sources.items():
        if source:
            print(
                f"           {source}: {own.tokens:,} tokens, {own.bytes:,} bytes, loss "
                f"{own.loss:.4f} a token, {own.loss_per_byte:.4f} a byte"
            )
    print(f"a token    loss {found.loss:.4f}, perplexity {found.perplexity:.3f}")
    print(
        f"a byte     loss {found.loss_per_byte:.4f}, perplexity {found.perplexity_per_byte:.3f}, "
        f"{found.bits_per_byte:.4f} bits"
    )
