r"""Ask a chip's compiler whether a training step fits, on a machine without the chip.

The step is the one that memopt pretrain and finetune run with the same options. It is compiled for
the chip by the chip's own compiler (pip install 'memopt[plan]' for TPUs, 'memopt[plan-gpu]' for
GPUs); nothing is allocated or run. Compilers take seconds for small models and minutes for large
ones; what they say is kept, so that the same question is answered at once.

Examples:
  memopt plan --model 7b --optimizer apollo_mini --chip v5e --mesh fsdp=16
  memopt plan --model 7b --optimizer adafactor --chip rtx4090 --release --weights int8
  memopt plan --model path/to/SmolLM-135M --chip h100 --batch-size 64 --seq-len 1024
  memopt plan --model 7b --optimizer lion --chip v5p --fit batch-size
  memopt plan --model 7b --chip rtx4090 --fit optimizer --optimizers adafactor apollo_mini
  memopt plan --model my_model:describe --optimizer optax:adam --chip v6e
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Annotated, Any, Literal

import jax
import tyro
from tyro import conf

from memopt.cli.errors import fail
from memopt.cli.fit import search
from memopt.cli.listing import make_console
from memopt.cli.plan_view import show, show_progress
from memopt.functions import call_function
from memopt.models.config import Remat
from memopt.planning.chips import only_compile
from memopt.planning.plan import Plan, first_line, plan, plan_step
from memopt.training.config import DType, State, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `memopt plan`.

    Attributes:
        model: A preset, such as 7b; a directory with a run or a Hugging Face model, of which only
            the config is read, and options that are not given are the run's; or MODULE:FUNCTION, a
            function that returns (parameters, loss, batch) of your own model, see docs/plan.md.
        optimizer: A name that `memopt optimizers` lists; or MODULE:FUNCTION of a function that
            maps learning_rate to an Optax transformation, such as optax:adam; by default
            apollo_mini.
        option: Argument of the optimizer, such as rank=128.
        chip: A TPU: v4, v5e, v5p, v6e, tpu7x; a GPU: a100-40, a100-80, h100, h200, b200, l40s,
            rtx3090, rtx4090, rtx5090; or cpu, this machine.
        mesh: Arrangement of the devices, such as data=2,fsdp=4; one device if not given.
        batch_size: Rows of a batch, over all devices and micro-batches; by default one row for each
            part that the mesh splits a micro-batch into, or those of the batch of your own model.
        seq_len: Tokens of a row; by default 2048, or as many as the model accepts.
        accumulation: Micro-batches that a batch is worked through in; by default 1.
        release: Update each block while the backward pass runs, so that all gradients are never
            there.
        weights: Store matrices in fewer bits.
        state: Store the optimizer's state in fewer bits.
        dtype: Type of parameters and activations; by default bfloat16, and float32 for a CPU.
        remat: What the backward pass computes again: nothing, all but matmuls, or all inside a
            block; by default all, and nothing with --release, which computes blocks again anyway.
        vocab_size: Token ids of the model, if not those of its preset.
        num_layers: Layers of the model, if not those of its preset.
        cache: Keep what the compiler says in ~/.cache/memopt/plan, and look there first.
        json: Print one JSON object.
        fit: Search for what fits: the largest batch-size; the smallest mesh of the axis fsdp, for
            --batch-size; or plan every optimizer, with weights and state as they are and in int8,
            released and not, as far as these are not given.
        optimizers: The optimizers to plan with --fit optimizer; by default all of memopt.
        processes: How many compile at a time with --fit optimizer; each may take gigabytes. By
            default one.
    """

    model: Annotated[str, conf.arg(metavar="NAME|DIRECTORY|MODULE:FUNCTION")]
    optimizer: Annotated[str | None, conf.arg(metavar="NAME|MODULE:FUNCTION")] = None
    option: Annotated[tuple[str, ...], conf.UseAppendAction, conf.arg(metavar="NAME=VALUE")] = ()
    chip: str = "v5e"
    mesh: Annotated[str | None, conf.arg(metavar="AXIS=SIZE,...")] = None
    batch_size: Annotated[int | None, conf.arg(metavar="INT")] = None
    seq_len: Annotated[int | None, conf.arg(metavar="INT")] = None
    accumulation: Annotated[int | None, conf.arg(metavar="INT")] = None
    release: bool = False
    weights: Weights | None = None
    state: State | None = None
    dtype: DType | None = None
    remat: Remat | None = None
    vocab_size: Annotated[int | None, conf.arg(metavar="INT")] = None
    num_layers: Annotated[int | None, conf.arg(metavar="INT")] = None
    cache: bool = True
    json: bool = False
    fit: Literal["batch-size", "mesh", "optimizer"] | None = None
    optimizers: Annotated[tuple[str, ...], conf.arg(metavar="NAME ...")] = ()
    processes: Annotated[int | None, conf.arg(metavar="INT")] = None

    def planner(self) -> Callable[..., Plan]:
        """Returns `memopt.plan`, or a function like it for a model of one's own."""
        return functools.partial(plan_own, self.model) if ":" in self.model else plan

    def arguments(self) -> dict[str, Any]:
        """These options as arguments of the planner.

        Raises:
            ValueError: An option is not for a model of one's own.
        """
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("json", "fit", "optimizers", "processes"):
            del named[name]
        named = {name: x for name, x in named.items() if x not in (None, ())}
        if ":" in self.model:
            del named["model"]
            for name in sorted(named.keys() - inspect.signature(plan_step).parameters):
                raise ValueError(
                    f"--{name.replace('_', '-')} must be left out with a model of your own, whose "
                    "function decides it."
                )
        return named


def plan_command(arguments: list[str]) -> None:
    """Runs `memopt plan` with these arguments."""
    options = tyro.cli(Options, prog="memopt plan", description=__doc__, args=arguments)
    only_compile()
    try:
        for name in ("optimizers", "processes"):
            if options.fit != "optimizer" and getattr(options, name) not in ((), None):
                raise ValueError(f"--{name} goes with --fit optimizer.")
        if options.fit:
            return search(options)
        with show_progress() as (working, _):
            found = options.planner()(**options.arguments(), progress=working)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    except jax.errors.JaxRuntimeError as error:
        fail(f"the compiler failed: {first_line(error)}", exit_code=1)
    except BrokenProcessPool:
        fail(
            "a process that compiled has ended, for want of memory perhaps: lower --processes. "
            "What was compiled is kept.",
            exit_code=1,
        )
    if options.json:
        print(json.dumps(found.to_json()))
    else:
        show(found, make_console())


def plan_own(name: str, **options: Any) -> Plan:
    """Plans what a function named MODULE:FUNCTION returns, by `memopt.plan_step`."""
    found = call_function(name)
    if not (isinstance(found, tuple) and len(found) == 3):
        raise ValueError(
            f"model {name!r} must return (parameters, loss, batch), got {type(found).__name__}."
        )
    named = plan_step(*found, **options)
    return dataclasses.replace(named, model=name)
