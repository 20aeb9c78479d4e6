"""Rows of a comparison: optimizers with their precision, and what is tuned of each."""

import ast
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from memopt.errors import check_choice
from memopt.optimizers.registry import find_method
from memopt.training.config import State, Weights

#: The method that others are compared with; it is tuned first and with more runs.
BASELINE = "adamw"


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer in some precision.

    A row with fewer bits or with a released step is trained at the tuned setting of its exact twin,
    so that they differ in nothing else.

    Attributes:
        optimizer: A name in `memopt.available()`, or ``module:function`` of a function that maps
            ``learning_rate`` to an `optax.GradientTransformation`.
        options: Its options, as pairs of name and value; these are not tuned.
        state: Precision that `memopt.quantize_state` stores its state in; None: as it is.
        weights: Precision that `memopt.quantize_params` stores matrices in; None: as they are.
        release: Whether each block is updated while the backward pass runs.

    Example:
        >>> row = Row.parse("apollo, rank=0.5, state int8, released")
        >>> row.options, row.state, row.release, row.exact.name
        ((('rank', 0.5),), 'int8', True, 'apollo, rank=0.5')
        >>> row.name
        'apollo, rank=0.5, state int8, released'
    """

    optimizer: str
    options: tuple[tuple[str, Any], ...] = ()
    state: str | None = None
    weights: str | None = None
    release: bool = False

    @property
    def name(self) -> str:
        """The optimizer and all that differs from its defaults."""
        parts = [self.optimizer, *(f"{name}={value}" for name, value in self.options)]
        parts += [f"state {self.state}"] * bool(self.state)
        parts += [f"weights {self.weights}"] * bool(self.weights)
        return ", ".join(parts + ["released"] * self.release)

    @property
    def exact(self) -> "Row":
        """The row whose tuned setting it is trained at: itself, if it is in full precision."""
        return Row(self.optimizer, self.options)

    @classmethod
    def parse(cls, text: str) -> "Row":
        """Inverts `name`.

        Raises:
            ValueError: An optimizer, an option or a precision is unknown.
        """
        optimizer, *rest = (part.strip() for part in text.split(", "))
        method = find_method(optimizer)
        options, given = {}, {}
        for part in rest:
            word, _, value = part.partition(" ")
            name, equals, number = part.partition("=")
            if word == "state":
                check_choice("state", value, get_args(State))
                given["state"] = value
            elif word == "weights":
                check_choice("weights", value, get_args(Weights))
                given["weights"] = value
            elif equals:
                check_choice(f"option of {optimizer}:", name, method.defaults)
                options[name] = _value(number)
            elif part != "released":
                raise ValueError(
                    f"method {text!r}: {part!r} must be NAME=VALUE, 'state PRECISION', "
                    "'weights PRECISION' or 'released'."
                )
        if "state" in given and method.eval_params:
            raise ValueError(f"method {text!r} must have no state precision: its state is weights.")
        return cls(optimizer, tuple(options.items()), release="released" in rest, **given)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class Tuned(NamedTuple):
    """An option that is tuned beside the learning rate.

    Attributes:
        option: Its name.
        values: Its values; the search starts with the first.
        reason: Why this option is tuned, or the source of its values.
    """

    option: str
    values: tuple[Any, ...]
    reason: str


_B2 = (
    "the memory of second moments, the most sensitive but for the rate: 0.95 to 0.98 in Wen et "
    "al., 2025"
)
_SCALE = "the size of the matrices' updates relative to the others', which the paper tunes"
_REFRESH = "the life of a subspace, which the paper's ablation varies; 200 is for longer runs"

#: The tuned option of each method. A method without one has all runs for its learning rate.
TUNED: Mapping[str, Tuned] = {
    "adamw": Tuned("b2", (0.999, 0.99, 0.95), _B2),
    "adafactor": Tuned("decay_rate", (0.8, 0.9, 0.6), "the paper's c, section 7"),
    "adagrad": Tuned("initial_accumulator_value", (0.1, 0.01, 0.001), "bounds the first steps"),
    "adagrad_norm": Tuned("initial", (0.01, 0.1, 0.001), "the paper's b₀, section 4"),
    "adalomo": Tuned("decay_rate", (0.8, 0.9, 0.6), "Adafactor's c"),
    "adam_mini": Tuned("b2", (0.999, 0.99, 0.95), _B2),
    "adam_atan2": Tuned("b2", (0.99, 0.999, 0.95), _B2),
    "ademamix": Tuned("b3", (0.9999, 0.999, 0.99), "the slow momentum must fit into the run"),
    "adopt": Tuned("b2", (0.9999, 0.99, 0.95), _B2),
    "amsgrad": Tuned("b2", (0.999, 0.99, 0.95), _B2),
    "apollo": Tuned("scale", (1.0, 0.5, 2.0), _SCALE),
    "apollo_mini": Tuned("scale", (128.0, 64.0, 32.0), _SCALE),
    "came": Tuned(
        "b3", (0.9999, 0.999, 0.99), "the memory of the confidence, which is not corrected"
    ),
    "badam": Tuned("switch_every", (50, 10, 100), "the paper's K, section 2.1"),
    "cocob": Tuned("alpha", (100.0, 10.0, 1000.0), "the paper's only constant"),
    "dadapt_adamw": Tuned("betas", ((0.9, 0.999), (0.9, 0.99), (0.9, 0.95)), _B2),
    "fira": Tuned("refresh_every", (200, 50, 20), _REFRESH),
    "flora": Tuned("refresh_every", (1000, 200, 50), _REFRESH),
    "frugal": Tuned("refresh_every", (200, 50, 20), _REFRESH),
    "galore": Tuned("refresh_every", (200, 50, 20), _REFRESH),
    "lamb": Tuned("b2", (0.999, 0.99, 0.95), _B2),
    "lars": Tuned("momentum", (0.9, 0.95, 0.8), "the memory of its only moment"),
    "ldadam": Tuned("b2", (0.99, 0.999, 0.95), _B2),
    "lion": Tuned("b2", (0.99, 0.98, 0.95), "0.98 in the paper, 0.95 in Wen et al., 2025"),
    "lomo": Tuned("clip_value", (None, 1.0, 0.1), "the paper's remedy against large gradients"),
    "mkor": Tuned("momentum", (0.9, 0.95, 0.8), "the memory of its first moment"),
    "momo": Tuned("beta", (0.9, 0.95, 0.8), "the memory of its only moment"),
    "momo_adam": Tuned("b2", (0.999, 0.99, 0.95), _B2),
    "muon": Tuned("beta", (0.95, 0.9, 0.98), "0.95 or 0.98 in Wen et al., 2025"),
    "nadamw": Tuned("b2", (0.999, 0.99, 0.95), _B2),
    "normuon": Tuned("beta", (0.95, 0.9, 0.98), "as Muon's"),
    "oasis": Tuned("b2", (0.999, 0.99, 0.95), "the memory of the curvature"),
    "online_subspace_descent": Tuned(
        "projector_learning_rate", (0.005, 0.02, 0.001), "how fast the subspace follows"
    ),
    "prodigy": Tuned("betas", ((0.9, 0.999), (0.9, 0.99), (0.9, 0.95)), _B2),
    "racs": Tuned("scale", (1.0, 0.5, 2.0), _SCALE),
    "rmnp": Tuned("beta", (0.95, 0.9, 0.98), "as Muon's"),
    "scale": Tuned("momentum", (0.9, 0.95, 0.8), "the memory of its only moment"),
    "schedule_free": Tuned("b1", (0.9, 0.95, 0.98), "the paper's β, section 4.2"),
    "sgd": Tuned("momentum", (0.9, 0.95, 0.98), "the memory of its only moment"),
    "slim_adam": Tuned("b2", (0.999, 0.99, 0.95), _B2),
    "sinkgd": Tuned("scale", (0.05, 0.1, 0.2), _SCALE),
    "sm3": Tuned("b1", (0.9, 0.95, 0.8), "the memory of its only moment"),
    "soap": Tuned("b2", (0.95, 0.99, 0.9), _B2),
    "sophia": Tuned("gamma", (0.01, 0.05, 0.002), "the share of clipped coordinates, section 3.1"),
    "tag": Tuned("b2", (0.99, 0.999, 0.95), _B2),
    "subtrack": Tuned("refresh_every", (200, 50, 20), _REFRESH),
}

#: Tuned for the baseline alone; other methods have no weight decay.
DECAY = Tuned("weight_decay", (0.0, 0.1), "0.1 in Wen et al., 2025, and for LLaMA")

#: Options that differ from the defaults.
FIXED: Mapping[str, Mapping[str, Any]] = {
    # Its adaptive step does not beat SGD on such models (docs/convergence.md), and 100 probes
    # before the first step are a quarter of the preset's runs.
    "oasis": {"adaptive": False, "first_probes": 20},
    # From random weights, the embedding and the head must be trained, too.
    "badam": {"embedding": True, "head": True},
}

#: Powers of two of the learning rates that searches start from. They are not the registry's, which
#: come from finished searches: a search starts again as it did before, and so finds its runs.
STARTS: Mapping[str, int] = {
    name: power
    for power, names in (
        (-12, "came"),
        (-11, "lion"),
        (-10, "badam flora frugal racs scale"),
        (-9, "adam_atan2 adam_mini adamw ademamix adopt amsgrad momo_adam nadamw"),
        (-9, "online_subspace_descent schedule_free slim_adam sophia tag"),
        (-8, "apollo_mini ldadam rmnp soap"),
        (-7, "apollo galore lamb normuon oasis"),
        (-6, "adagrad fira muon sinkgd sm3 subtrack"),
        (-4, "adafactor adalomo lomo sgd"),
        (-3, "mkor"),
        (-2, "adagrad_norm"),
        (0, "cocob dadapt_adamw dog dowg mechanic momo prodigy"),
        (2, "lars"),
    )
    for name in names.split()
}

#: Schedules that differ from the protocol's: the average replaces the decay.
SCHEDULES = {"schedule_free": "constant"}


def fixed_options(row: Row) -> dict[str, Any]:
    """Returns the options of a row that are not tuned; weights do not decay, unless it says so.

    Example:
        >>> fixed_options(Row("nadamw"))
        {'weight_decay': 0.0}
    """
    decay = {"weight_decay": 0.0} if find_method(row.optimizer).defaults.get("weight_decay") else {}
    return {**decay, **FIXED.get(row.optimizer, {}), **dict(row.options)}


def tuned_options(row: Row) -> dict[str, tuple[Any, ...]]:
    """Returns the options of a row that are tuned, with their values.

    Example:
        >>> tuned_options(Row("adamw", (("b2", 0.9),)))
        {'weight_decay': (0.0, 0.1)}
    """
    tuned = [TUNED[row.optimizer]] if row.optimizer in TUNED else []
    tuned += [DECAY] * (row.optimizer == BASELINE)
    given = dict(row.options)
    return {option: values for option, values, _ in tuned if option not in given}


def first_rate(row: Row) -> int:
    """Returns the power of two of the learning rate that the search starts from.

    A user's function starts as AdamW does.

    Example:
        >>> first_rate(Row("adamw")), first_rate(Row("dog")), first_rate(Row("optax:adam"))
        (-9, 0, -9)
    """
    name = BASELINE if ":" in row.optimizer else row.optimizer
    if name in STARTS:
        return STARTS[name]
    return round(math.log2(find_method(name).learning_rate))


#: Every method of the registry that trains matrices, the best known first. Optax's versions of
#: memopt's are left out.
METHOD_ROWS = (
    *("adamw", "muon", "lion", "adafactor", "apollo_mini", "apollo", "soap", "galore", "fira"),
    *("ldadam", "flora", "frugal", "online_subspace_descent", "adalomo", "lomo", "sgd", "sm3"),
    *("lamb", "lars", "schedule_free", "ademamix", "adopt", "adam_atan2", "nadamw", "amsgrad"),
    *("sophia", "prodigy", "mkor", "oasis", "tag", "adagrad", "adagrad_norm", "momo_adam", "momo"),
    *("dadapt_adamw", "mechanic", "dog", "dowg", "cocob"),
    *("adam_mini", "slim_adam"),
    *("normuon", "rmnp", "scale", "sinkgd", "racs"),
    *("badam", "came", "subtrack"),
)

#: Rows that differ from an exact twin in precision only.
PRECISION_ROWS = (
    *("adamw, state int8", "adamw, state int4", "adamw, weights int8", "adamw, released"),
    *("muon, state int8", "muon, state int4", "lion, state int8", "soap, state int8"),
    *("apollo_mini, state int8", "apollo_mini, weights int8", "apollo_mini, released"),
    *("apollo, state int8", "apollo, state int4", "galore, state int8"),
    *("adafactor, weights int8", "adafactor, released"),
)

#: Rows of methods with options that need less state, and of these in fewer bits.
CHEAPER_ROWS = ("soap, one_sided=True", "soap, block_size=64", "soap, one_sided=True, state int8")

#: The rows of a comparison that is given none.
ROWS = METHOD_ROWS + PRECISION_ROWS + CHEAPER_ROWS
