"""Array types for signatures: jaxtyping shapes for type checkers, `jax.Array` at run time."""

from typing import TYPE_CHECKING

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Float, UInt32

    Stack = Float[Array, "*stack m n"]
    """Matrices: a full-size gradient or update."""

    Basis = Float[Array, "*stack side r"]
    """A basis of r columns for one side, m or n, of each matrix; without stack axes, for all."""

    LowRank = Float[Array, "*stack a b"]
    """An array in the subspace: r×n if rows are projected, m×r if columns are."""

    Square = Float[Array, "*stack side side"]
    """Symmetric matrices."""

    Numbers = Float[Array, "*rows n"]
    """Numbers that a codec stores row by row."""

    Bits = UInt32[Array, "*rows n"]
    """Random bits that decide the rounding of each number."""
else:
    Stack = Basis = LowRank = Square = Numbers = Bits = Array
