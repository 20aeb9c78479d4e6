"""Sentences of README and docs with figures, and the result files that these are from."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.comparison import CONTROL, by_method
from benchmarks.report import GIB
from benchmarks.results import RESULTS, ROOT, read

Results = Any
"""The results in a file."""


class Claim(NamedTuple):
    """A sentence, or a part of one, with figures.

    Attributes:
        page: the page, from the repository's root.
        text: the words, with fields for the figures.
        files: the names of result files, without .json.
        figures: returns the figures, given the results in the files.
    """

    page: str
    text: str
    files: tuple[str, ...]
    figures: Callable[..., Sequence[float]]

    def sentence(self) -> str:
        """The words with the figures of the files."""
        reports = [read(RESULTS / (name if "." in name else f"{name}.json")) for name in self.files]
        return self.text.format(*self.figures(*(report["results"] for report in reports)))

    def holds(self) -> bool:
        """Whether the page has the sentence, broken into lines in any way."""
        return self.sentence() in " ".join((ROOT / self.page).read_text().split())


def _row(results: Results, **values: Any) -> dict[str, Any]:
    """The only row that has these values."""
    [found] = [r for r in results if all(r[key] == value for key, value in values.items())]
    return found


def _ratios(results: Results) -> dict[str, float]:
    return {r["name"]: r["ratio"]["median"] for r in results}


def _losses(results: Results) -> list[float]:
    found = by_method(results)
    return [found[method]["0.5M"].loss for method in (CONTROL, "adamw")]


def _bytes_a_parameter(results: Results) -> list[float]:
    names = ("adamw", "galore", "apollo_mini", "adafactor")
    rows = [_row(results, optimizer=name, model="7b") for name in names]
    return [4 * r["state_bytes"] / r["parameter_bytes"] for r in rows]


def _refresh(results: Results) -> Iterator[float]:
    """Cost and least energy of ranks 128 and 512, first without iterations and gradients alone."""
    rows = {
        (iterations, rank): _row(
            results, name=f"randomized_svd, {iterations} iterations", rank=rank
        )
        for iterations in (0, 2)
        for rank in (128, 512)
    }
    cheaper = lambda iterations, rank: rows[iterations, rank]["times_cheaper"]["median"]
    least = lambda i, rank, kind: min(rows[i, rank]["energy"][kind].values())
    for rank in (128, 512):
        yield cheaper(0, rank)
        yield math.floor(1000 * least(0, rank, "gradient")) / 10
    yield from (100 * least(0, rank, "noise") for rank in (128, 512))
    yield from (100 * least(2, rank, "noise") for rank in (128, 512))
    yield from (cheaper(2, rank) for rank in (128, 512))


def _release(results: Results) -> list[float]:
    rows = [_row(results, kind=kind) for kind in ("ordinary", "released")]
    speed = rows[1]["speed"]
    return [
        *(r["compiler_bytes"] / GIB for r in rows),
        *(r["resident_bytes"] / GIB for r in rows),
        *(speed["median"], speed["min"], speed["max"]),
    ]


def _processor_seconds(results: Results) -> list[float]:
    names = ("adamw", "adafactor", "galore", "adamw:int8")
    return [
        _row(results, model=model, optimizer=name)["processor_seconds"]
        for model in ("llama-7b", "separate")
        for name in names
    ]


def _memory(results: Results, rtx4090: Results) -> list[float]:
    adafactor = {"optimizer": "adafactor", "weights": None}
    four = adafactor | {"model": "7b", "weights": "int4"}
    large = adafactor | {"model": "13b", "weights": "int8"}
    pod = adafactor | {"model": "7b", "mesh": "fsdp=16"}
    small = adafactor | {"model": "7b", "weights": "int8", "release": True}
    rows = [_row(results, **four), _row(results, **large)]
    rows += [_row(results, **pod, release=release) for release in (False, True)]
    return [*(r["peak_bytes"] / GIB for r in rows), _row(rtx4090, **small)["peak_bytes"] / 1e9]


def _width(results: Results) -> list[float]:
    """Loss at width 256 of the rate that is best at width 64, above the best there."""
    at = {r["rate"]: r["loss"] for r in results if (r["scheme"], r["width"]) == ("global", 256)}
    return [at[-8] - min(at.values())]


CLAIMS = (
    *(
        Claim(
            page,
            "Bytes of optimizer state per parameter at 7B: AdamW {:.0f}, GaLore {:.1f}, "
            "APOLLO-Mini {:.2f}, Adafactor {:.3f}",
            ("state_bytes",),
            _bytes_a_parameter,
        )
        for page in ("README.md", "docs/index.md", "docs/why.md")
    ),
    Claim(
        "docs/why.md",
        "For a model of 7 billion parameters these are {:.0f} GB in float32",
        ("state_bytes",),
        lambda r: [_row(r, optimizer="adamw", model="7b")["state_bytes"] / 1e9],
    ),
    Claim(
        "docs/five_minutes.md",
        "After {} steps the 1.9M-parameter model reaches a validation loss of about {:.2f} nats "
        "per byte (perplexity {:.1f})",
        ("pretrain",),
        lambda r: [r["steps"], r["val_loss"], math.exp(r["val_loss"])],
    ),
    Claim(
        "docs/choosing.md",
        "with a tenth of the learning rate for matrices AdamW comes to {:.2f} nats at 0.5M, in "
        "place of {:.2f}",
        ("compare.jsonl",),
        _losses,
    ),
    Claim(
        "docs/release.md",
        "With 4-bit weights Adafactor needs {:.2f} GiB, and LLaMA-13b in int8 {:.2f}. On 4×4 chips "
        "with `--mesh fsdp=16` and 16 rows, Adafactor needs {:.2f} per chip, released {:.2f}. GPU "
        "compilers report similar figures: {:.2f} GB on an RTX 4090",
        ("memory", "memory_rtx4090"),
        _memory,
    ),
    Claim(
        "docs/speed.md",
        "AdamW with int8 state (`--optimizer adamw --state int8`) takes {:.1f} times as long as "
        "with float32 state",
        ("step_time_8bit",),
        lambda r: [_ratios(r)["adamw_8bit"]],
    ),
    Claim(
        "docs/speed.md",
        "Muon is {:.1f} times as fast as `optax.contrib.muon` with stacked layers, and {:.1f} "
        "times as fast as with separate ones",
        ("muon",),
        lambda r: [_ratios(r)["optax_stacked"], _ratios(r)["optax_separate"]],
    ),
    Claim(
        "docs/speed.md",
        "On the matrices of an MLP of LLaMA-1b its step is {:.1f} times as fast as that of the "
        "plain iteration",
        ("gram",),
        lambda r: [_ratios(r)["plain"]],
    ),
    Claim(
        "docs/speed.md",
        "takes {:.0f} times less processor time (one CPU core) than by `jnp.linalg.svd` at rank "
        "128 and captures at least {:.1f}% of the best subspace's energy; at rank 512 it takes "
        "{:.0f} times less and captures {:.1f}%. For white noise, the worst case, it captures "
        "{:.0f}% and {:.0f}%; `iterations=2` captures {:.0f}% and {:.0f}% and takes {:.0f} and "
        "{:.0f} times less time than the SVD",
        ("refresh_cost",),
        lambda r: [*_refresh(r)],
    ),
    Claim(
        "docs/release.md",
        "the compiler predicts {:.2f} GiB for the ordinary step and {:.2f} for the released one; "
        "{:.2f} and {:.2f} became resident. The released step processes {:.2f} times as many "
        "tokens per second as the ordinary one ({:.2f}–{:.2f})",
        ("release",),
        _release,
    ),
    Claim(
        "docs/speed.md",
        "for those of LLaMA-60m it keeps {:.1f} MB, as Adam does, where memopt's keeps {:.1f}",
        ("state_bytes_others_stacked",),
        lambda r: [
            _row(r, optimizer=n)["hidden_bytes"] / 1e6 for n in ("rollfast_apollo", "apollo")
        ],
    ),
    Claim(
        "docs/speed.md",
        "With separate layers it keeps {:.1f} MB for the whole model and memopt's {:.1f}",
        ("state_bytes_others_list",),
        lambda r: [
            _row(r, optimizer=n)["state_bytes"] / 1e6 for n in ("rollfast_apollo", "apollo")
        ],
    ),
    Claim(
        "docs/sharding.md",
        "it takes {:.1f} s with AdamW, {:.1f} s with Adafactor, {:.1f} s with GaLore and {:.1f} s "
        "with 8-bit AdamW; for 300 separate matrices {:.1f}, {:.0f}, {:.0f} and {:.0f} s",
        ("sharding_time",),
        _processor_seconds,
    ),
    Claim(
        "docs/learning_rates.md",
        "At width 256 the rate that is best at width 64 costs {:.2f} nats with a global rate",
        ("width",),
        _width,
    ),
)
"""All sentences that are checked."""

#: Tables whose numbers are not measured: the source of each, by page and first columns.
NOT_MEASURED = {
    "docs/choosing.md": {"you want | take": "names of methods and precisions"},
    "docs/combinations.md": {"combination | what holds": "definitions"},
    "docs/comparison.md": {
        "preset | models": "`memopt.comparison.PRESETS`",
        "column | meaning": "definitions",
    },
    "docs/compose.md": {"transformation | for": "names of transformations"},
    "docs/controllers.md": {"column |": "fields of a file", "| | by default": "options of a class"},
    "docs/convergence.md": {"optimizers | default learning rate": "the registry"},
    "docs/design.md": {"level | package": "`tests/test_rooms.py`"},
    "docs/device.md": {"piece | measured": "sizes that `benchmarks.device` measures"},
    "docs/extra_arguments.md": {
        "method | needs": "the registry",
        "Adam | TAG with": "`tests/transforms/test_task_moments.py`",
    },
    "docs/guarantees.md": {"condition | guarantee": "definitions"},
    "docs/hugging_face.md": {
        "`model_type` | models": "names of models",
        "`rope_type` |": "a published formula",
        "|": "what a directory may hold",
    },
    "docs/index.md": {"| |": "links"},
    "docs/install.md": {"extra | for": "`pyproject.toml`"},
    "docs/laws.md": {"law | gives": "the laws' papers"},
    "docs/learning_rates.md": {
        "name | after the warm-up": "formulas",
        "| embedding": "exponents, derived on the page",
    },
    "docs/libraries.md": {"| embedding, position": "names, `tests/clients/test_recipes.py`"},
    "docs/precision.md": {"codec | first moments": "`tests/state/test_codecs.py`"},
    "docs/processes.md": {"| starts": "commands"},
    "docs/runs.md": {"what happens | what": "exit codes, `tests/cli`"},
    "docs/subspace.md": {
        "projector | R": "the pairs that `tests/optimizers/test_pairings.py` tries",
        "recombination | U": "formulas",
        "method | inner": "published settings",
    },
    "docs/trainers.md": {
        "trainer | versions tried": "versions of libraries",
        "| embedding, position": "names, `tests/clients`",
    },
}
