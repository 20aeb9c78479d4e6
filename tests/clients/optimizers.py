"""The optimizers that every client is tried with: memopt's own, and AdamW that keeps codes."""

import functools

import optax

import memopt
from benchmarks.extra_arguments import with_extra_arguments
from memopt.optimizers.registry import METHODS as REGISTERED


def adamw_8bit(learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """AdamW whose moments are 8 bits each."""
    return optax.chain(
        memopt.quantize_state(optax.scale_by_adam(), "int8", min_size=0),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(learning_rate),
    )


METHODS = {
    name: functools.partial(
        with_extra_arguments(memopt.optimizer),
        name,
        **({"rank": 2} if REGISTERED[name].has_free_rank else {}),
    )
    for name in memopt.available("memopt")
} | {"adamw_8bit": adamw_8bit}
SOME = ("adafactor", "apollo_mini", "galore", "muon", "frugal", "ldadam", "lion", "adamw_8bit")
