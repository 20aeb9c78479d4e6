"""Trains a LLaMA on the device, and measures memory and tokens per second."""

import functools
import statistics
import time
from collections.abc import Iterator, Sequence

import jax

from benchmarks.device import text
from benchmarks.device.jobs import Job, Record
from benchmarks.training_step import Options, TrainingStep
from memopt.planning.step_memory import step_memory

#: Without autotuning a program compiles in a fraction of the time and uses about the same memory.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
#: The fraction of the memory that the largest batch may use, as counted by the compiler.
FILLED = 0.97
#: Fractions of the estimated batch that are tried, one after another.
ATTEMPTS = (1, 0.95, 0.85)


def shrunk(options: Options, small: bool) -> Options:
    """The options, or those of a tiny model."""
    return options._replace(model="tiny", seq_len=64) if small else options


class Run:
    """A training step that is compiled before any array is on the device."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.step = TrainingStep(options, jax.devices())
        start = time.perf_counter()
        self.compiled = self.step.compile()
        self.compile_seconds = time.perf_counter() - start
        self.init = self.step.compile_init()
        self.text = text.batches(
            self.step.config.vocab_size, batch_size=options.batch_size, seq_len=options.seq_len
        )

    def take(self, steps: int) -> Record:
        """Initializes the state, takes some steps, and measures them after a warm-up step."""
        self.start()
        for _ in range(steps):
            self.one()
        return self.record()

    def start(self) -> None:
        """Initializes the state."""
        self.state = jax.block_until_ready(self.init())
        self.start_bytes = _peak()
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def one(self) -> None:
        """Takes a step and waits for it."""
        batch = self.step.place(next(self.text))
        start = time.perf_counter()
        self.state, metrics = jax.block_until_ready(self.step(self.state, batch))
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(float(metrics["loss"]))

    def record(self) -> Record:
        """The options and the measurements."""
        like = self.step.like
        counted = step_memory(self.compiled, like.params, like.opt_state)
        tokens = self.options.batch_size * self.options.seq_len
        return {
            **self.options._asdict(),
            "steps": len(self.losses),
            "tokens_per_second": tokens / statistics.median(self.seconds[1:]),
            "losses": self.losses,
            "start_bytes": self.start_bytes,
            "peak_bytes": _peak(),
            "limit_bytes": _memory().get("bytes_limit"),
            "compiler_bytes": counted.peak,
            "parameter_bytes": counted.parameters,
            "state_bytes": counted.state,
            "compile_seconds": self.compile_seconds,
        }


def _memory() -> dict[str, int]:
    return jax.devices()[0].memory_stats() or {}


def _peak() -> int | None:
    """The peak of the device memory that this process has used; None on a CPU."""
    return _memory().get("peak_bytes_in_use")


def train(names: Sequence[str], small: bool, *, options: Options, steps: int) -> Iterator[Record]:
    """Measures one run of some steps."""
    (name,) = names
    yield {"name": name, **Run(shrunk(options, small)).take(3 if small else steps)}


def side_by_side(names: Sequence[str], small: bool, *, of: dict[str, Options]) -> Iterator[Record]:
    """Measures several runs in turn; the peak of each run alone is unknown."""
    runs = {name: Run(shrunk(of[name], small)) for name in names}
    for run in runs.values():
        run.start()
    for _ in range(3 if small else 8):
        for run in runs.values():
            run.one()
    for name, run in runs.items():
        yield {"name": name, **run.record(), "start_bytes": None, "peak_bytes": None}


def largest_batch(
    names: Sequence[str], small: bool, *, options: Options, memory: int
) -> Iterator[Record]:
    """Estimates the largest batch from compiled peaks, then runs it."""
    (name,) = names
    options = shrunk(options, small)

    def peak(rows: int) -> int:
        step = TrainingStep(options._replace(batch_size=rows), jax.devices())
        try:
            compiled = step.compile(UNTUNED if jax.default_backend() == "gpu" else None)
        except jax.errors.JaxRuntimeError:  # some products have no kernel without autotuning
            compiled = step.compile()
        counted = step_memory(compiled, step.like.params, step.like.opt_state)
        assert counted.peak is not None
        return counted.peak

    def attempt(rows: int) -> Record | None:
        """Runs with this number of rows; None if they do not fit."""
        try:
            return Run(options._replace(batch_size=rows)).take(3 if small else 5)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None

    few, many = 4, 8
    rows = many
    if not small:
        least = peak(few)
        each = (peak(many) - least) / (many - few)
        if each <= 0:
            raise RuntimeError(f"{many} rows need no more memory than {few}.")
        rows = few + int((FILLED * memory - least) / each)
    for part in ATTEMPTS:
        if (tried := int(part * rows)) < 1:
            break
        if record := attempt(tried):
            # After a failure, the process's peak belongs to the batch that did not fit.
            known = {} if part == 1 else {"start_bytes": None, "peak_bytes": None}
            yield {"name": name, **record, **known}
            return
    raise RuntimeError(f"no batch of {ATTEMPTS} times {rows} rows fits {memory} bytes.")


# Adafactor's rate is relative to the parameters' size. With these the loss falls in 20 steps.
RELEASED = Options("7b", "adafactor", release=True, weights="int8", learning_rate=1e-2)
MINI = RELEASED._replace(optimizer="apollo_mini", state="int8", learning_rate=1e-3)
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
