"""Training a LLaMA on the device: the memory it takes, and tokens a second."""

import functools
import statistics
import time
from collections.abc import Iterator, Sequence

import jax

from benchmarks.device import text
from benchmarks.device.jobs import Job, Record
from benchmarks.training_step import Options, TrainingStep
from memopt.planning.step_memory import step_memory

#: Without autotuning a program compiles in a fraction of the time, and takes the same memory.
UNTUNED = {"xla_gpu_autotune_level": 0}
#: The part of the memory that the largest batch may take by the compiler's count.
FILLED = 0.97


def shrunk(options: Options, small: bool) -> Options:
    """The options, or those of a tiny model."""
    return options._replace(model="tiny", seq_len=64) if small else options


class Run:
    """A step that is compiled, before anything is on the device."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.step = TrainingStep(options, jax.devices())
        start = time.perf_counter()
        self.compiled, self.init = self.step.compile(), self.step.compile_init()
        self.compile_seconds = time.perf_counter() - start
        self.text = text.batches(
            self.step.config.vocab_size, batch_size=options.batch_size, seq_len=options.seq_len
        )

    def start(self) -> None:
        """Makes the state on the device."""
        self.state = self.init()
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def take(self) -> None:
        """Takes a step, and waits for it."""
        batch = self.step.place(next(self.text))
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, batch)
        jax.block_until_ready(self.state)
        self.losses.append(float(metrics["loss"]))
        self.seconds.append(time.perf_counter() - start)

    def record(self) -> Record:
        """What was measured; the first step is warm-up."""
        like = self.step.like
        said = step_memory(self.compiled, like.params, like.opt_state)
        stats = jax.devices()[0].memory_stats() or {}
        tokens = self.options.batch_size * self.options.seq_len
        return {
            **self.options._asdict(),
            "steps": len(self.losses),
            "tokens_per_second": tokens / statistics.median(self.seconds[1:]),
            "losses": self.losses,
            "peak_bytes": stats.get("peak_bytes_in_use"),
            "limit_bytes": stats.get("bytes_limit"),
            "compiler_bytes": said.peak,
            "parameter_bytes": said.parameters,
            "state_bytes": said.state,
            "compile_seconds": self.compile_seconds,
        }


def train(
    names: Sequence[str], small: bool, *, options: Options, steps: int, small_steps: int = 3
) -> Iterator[Record]:
    """One run of some steps."""
    (name,) = names
    run = Run(shrunk(options, small))
    run.start()
    for _ in range(small_steps if small else steps):
        run.take()
    yield {"name": name, **run.record()}


def side_by_side(names: Sequence[str], small: bool, *, of: dict[str, Options]) -> Iterator[Record]:
    """Several runs that take turns; no peak is known of one."""
    runs = {name: Run(shrunk(of[name], small)) for name in names}
    for run in runs.values():
        run.start()
    for _ in range(3 if small else 8):
        for run in runs.values():
            run.take()
    for name, run in runs.items():
        yield {"name": name, **run.record(), "peak_bytes": None}


def largest_batch(
    names: Sequence[str], small: bool, *, options: Options, memory: int
) -> Iterator[Record]:
    """The run with the most rows whose step fits, as the compiler counts, and then as it is."""
    (name,) = names
    options = shrunk(options, small)
    memory = 2**25 if small else memory

    def peak(rows: int) -> int:
        step = TrainingStep(options._replace(batch_size=rows), jax.devices())
        untuned = UNTUNED if jax.default_backend() == "gpu" else None
        said = step_memory(step.compile(untuned), step.like.params, step.like.opt_state).peak
        assert said is not None
        return said

    few, many = 4, 8
    each = (peak(many) - peak(few)) / (many - few)
    rows = int((FILLED * memory - peak(few)) / each) + few
    while True:
        try:
            run = Run(options._replace(batch_size=rows))
            run.start()
            for _ in range(3 if small else 5):
                run.take()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rows == 1:
                raise
            rows = min(rows - 1, int(0.95 * rows))
        else:
            yield {"name": name, **run.record()}
            return


RELEASED = Options("7b", "adafactor", release=True, weights="int8")
MINI = RELEASED._replace(optimizer="apollo_mini", state="int8")
MEMORY = tuple(
    Job((name,), functools.partial(train, options=options, steps=20), 12 * 10**9)
    for name, options in {
        "adafactor, released, int8 weights": RELEASED,
        "apollo_mini, released, int8 weights and state": MINI,
    }.items()
)

ORDINARY_1B = Options("1b", "apollo_mini", batch_size=4)
TURNS = {
    "apollo_mini, ordinary": ORDINARY_1B,
    "apollo_mini, released": ORDINARY_1B._replace(release=True),
}
CARD = 24 * 10**9
RELEASE = (
    Job(tuple(TURNS), functools.partial(side_by_side, of=TURNS)),
    *(
        Job(
            (f"{name}, largest batch",),
            functools.partial(largest_batch, options=options, memory=CARD),
            CARD,
        )
        for name, options in {"adamw, ordinary": Options("1b", "adamw"), **TURNS}.items()
    ),
)

MODELS = tuple(
    Job((name,), functools.partial(train, options=options, steps=5))
    for name, options in {
        "llama-3-8b, int8 weights": RELEASED._replace(model="llama-3-8b"),
        "13b, int8 weights": RELEASED._replace(model="13b"),
        "7b, int4 weights": RELEASED._replace(weights="int4"),
    }.items()
)
