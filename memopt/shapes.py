"""Shapes of arrays in signatures, as jaxtyping writes them; to Python each is a `jax.Array`."""

from typing import TYPE_CHECKING

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Float, UInt32

    Stack = Float[Array, "*stack m n"]
    """Matrices: a gradient or an update of full size."""

    Basis = Float[Array, "*stack side r"]
    """A basis of r columns for one side, m or n, of each matrix; without a stack one for all."""

    Projected = Float[Array, "*stack p q"]
    """What is in the subspace: r×n if rows are projected, m×r if columns are."""

    Square = Float[Array, "*stack side side"]
    """Symmetric matrices."""

    Numbers = Float[Array, "*rows n"]
    """What a codec stores, row by row."""

    Bits = UInt32[Array, "*rows n"]
    """Random bits that decide the rounding of each number."""
else:
    Stack = Basis = Projected = Square = Numbers = Bits = Array
