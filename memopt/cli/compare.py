r"""Compare optimizers: tune each with the same number of runs, then train it over several seeds.

Examples:
  memopt compare --output trial --methods muon --sizes 0.5M --steps 100 --tuning-runs 3
  memopt compare --preset cpu --output comparison --jobs 2
  memopt compare --output comparison --methods "apollo, rank=0.125" "muon, state int8"
  memopt compare --output comparison --methods mypackage.optimizers:mine --data 'books/*.txt'
  memopt compare --output comparison --methods muon --sizes 0.5M --target-loss 2.2
  memopt compare --output comparison --methods muon --target-loss 2.2 --over batch_size
  memopt compare --preset gpu-small --output comparison --minutes 9

Finished runs are in OUTPUT/compare.jsonl, and are never repeated: the same command goes on where it
was stopped, and others with the same output share its runs, also at the same time. At the end, a
compiler plans the peak of memory of each method's step, seconds for small models, and once. Then
OUTPUT/report.md and pictures beside it are written of all that is finished: loss against bytes of
state, losses on the way, and how much the learning rate matters. docs/comparison.md has more.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro import conf

from memopt.cli.errors import fail
from memopt.cli.peaks import plan_peaks
from memopt.comparison.protocol import PRESETS, Protocol, make_protocol
from memopt.comparison.report import tables, write_report
from memopt.comparison.runner import compare
from memopt.comparison.worker import IncompleteError, OutOfTimeError
from memopt.errors import check_choice
from memopt.planning.chips import CHIPS

Ints = Annotated[tuple[int, ...], conf.arg(metavar="INT ...")]
Int = Annotated[int | None, conf.arg(metavar="INT")]

#: The value of `--chip` that leaves the peaks out.
NO_PEAKS = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `memopt compare`.

    Attributes:
        output: Directory of the results.
        preset: cpu: 0.5 and 2 million parameters, hours on two cores. gpu-small: 10, 25 and 60
            million, for one GPU, where it was not run yet. --steps, --data and others change it;
            runs of other protocols in the same output are not mixed with these.
        methods: Optimizers that `memopt optimizers` lists, or MODULE:FUNCTION of a function that
            maps learning_rate to an Optax transformation; each may be followed by options, "state
            int8", "weights int8" or "released", after commas. By default all that train matrices,
            and some with fewer bits. AdamW is always among them, and so is each method in full
            precision.
        sizes: Sizes of the model; by default all of the preset.
        steps: Steps of a run, a multiple of 20.
        batch_size: Rows of a batch.
        seq_len: Tokens of a row.
        data: Files, directories, globs or hf:NAME of the text, as of `memopt pretrain`, which is
            read as bytes; by default the Python code of the standard library.
        eval_tokens: Held-out tokens that are evaluated on.
        tuning_runs: Runs that each method is tuned with; AdamW with half as many again.
        seeds: Seeds of the runs that count, other than that of the runs which tune.
        target_loss: Find the fewest steps in which each method comes to this loss on the held-out
            tokens, with the schedule fitted to each number of steps, in place of the loss after a
            given number. --steps is then where the search begins.
        over: With --target-loss: find them at several batch sizes.
        batch_sizes: The batch sizes of --over; by default those of the preset.
        jobs: Processes to run, which share the cores. Times of steps are then not measured.
        minutes: End before a run that would take longer than so many minutes from the start, by
            the longest run so far. Peaks are planned when all runs are finished.
        chip: The chip whose compiler plans the peak of memory of each method's step, one that
            `memopt plan` knows, such as v5e; none: leave the peaks out. By default the chip that
            the runs were made on.
    """

    output: Annotated[Path, conf.arg(metavar="DIRECTORY")]
    preset: Literal[tuple(PRESETS)] = "cpu"  # type: ignore[valid-type]
    methods: Annotated[tuple[str, ...], conf.arg(metavar="METHOD ...")] = ()
    sizes: Annotated[tuple[str, ...], conf.arg(metavar="SIZE ...")] = ()
    steps: Int = None
    batch_size: Int = None
    seq_len: Int = None
    data: Annotated[tuple[str, ...], conf.arg(metavar="TEXT ...")] = ()
    eval_tokens: Int = None
    tuning_runs: Int = None
    seeds: Ints = ()
    target_loss: Annotated[float | None, conf.arg(metavar="FLOAT")] = None
    over: Literal["batch_size"] | None = None
    batch_sizes: Ints = ()
    jobs: int = 1
    minutes: Annotated[float | None, conf.arg(metavar="FLOAT")] = None
    chip: Annotated[str | None, conf.arg(metavar="NAME")] = None

    def protocol(self) -> Protocol:
        """Returns the preset with what is given in place of its fields.

        Raises:
            ValueError: A value is not allowed, or has no effect.
        """
        if self.batch_size is not None and self.over:
            raise ValueError("batch_size must be left out with over, which takes batch_sizes.")
        if self.batch_sizes and not self.over:
            raise ValueError("batch_sizes must be given with over: give batch_size for one.")
        names = {field.name for field in dataclasses.fields(Protocol)} & vars(self).keys()
        given = {name: value for name in names if (value := getattr(self, name)) not in (None, ())}
        return make_protocol(self.preset, sizes=self.sizes, **given)


def compare_command(arguments: list[str]) -> None:
    """Runs `memopt compare` with these arguments."""
    config = (conf.FlagCreatePairsOff,)
    options = tyro.cli(
        Options, prog="memopt compare", description=__doc__, args=arguments, config=config
    )
    console = Console()
    again = "All finished runs are kept: give the same command again for the others."
    stopped, incomplete = "", None
    try:
        if options.chip is not None:
            check_choice("chip", options.chip, [*CHIPS, "cpu", NO_PEAKS])
        compare(
            options.output,
            options.protocol(),
            methods=options.methods,
            target_loss=options.target_loss,
            over=options.over,
            jobs=options.jobs,
            minutes=options.minutes,
            console=console,
        )
    except OutOfTimeError:
        stopped = f"The next run would take longer than --minutes {options.minutes:g}. {again}"
    except IncompleteError as error:
        incomplete = error
    except KeyboardInterrupt:
        fail(f"interrupted. {again}", 130)
    except (ValueError, ImportError, OSError) as error:
        fail(error)
    lines = [stopped] if stopped else []
    plan = functools.partial(plan_peaks, chip=options.chip, tell=lines.append)
    leave_out = stopped or options.chip == NO_PEAKS
    try:
        console.print(*tables(write_report(options.output, None if leave_out else plan)))
        lines.append(f"Tables and pictures: {options.output / 'report.md'}, and beside it.")
    except KeyboardInterrupt:
        fail(f"interrupted. {again}", 130)
    except FileNotFoundError:  # no run is finished
        pass
    except OSError as error:
        fail(error)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if incomplete:
        fail(incomplete)
