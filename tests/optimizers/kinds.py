"""Methods that stand for the others where a mechanism is tested that they share."""

import pytest

KINDS = {
    "adafactor": "sums over rows and columns",
    "lion": "works entry by entry",
    "muon": "multiplies whole matrices",
    "apollo_mini": "draws a subspace",
    "galore": "decomposes a gradient",
    "frugal": "selects entries",
    "ldadam": "moves its subspace at every step",
}
"""One method of each kind, and what makes the kind."""

STRUCTURES = {"adafactor", "galore", "ldadam"}
"""Those of them whose states have different structures: factors, a stored basis, a moving one."""

ENTRYWISE = {"adam_atan2", "adopt", "amsgrad"}
"""Methods that work entry by entry, for which "lion" stands."""


def slow_unless(quick: bool) -> list[pytest.MarkDecorator]:
    """The marks of a test that runs with ``-m slow`` only, unless it is a quick one."""
    return [] if quick else [pytest.mark.slow]


#: Optax's methods whose sums have the dtype of the parameters, which must be one.
SUMS_LIKE_PARAMETERS = ("dadapt_adamw", "dog", "dowg", "mechanic", "momo", "momo_adam", "prodigy")
