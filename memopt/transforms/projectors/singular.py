"""The subspace of a gradient's leading singular vectors."""

import dataclasses

import jax
from jax import Array

from memopt.errors import check_at_least
from memopt.transforms.linalg import leading_eigenvectors, orthonormal, product, turned
from memopt.transforms.projectors.base import Leaf, Projector, When


@dataclasses.dataclass(frozen=True)
class Svd(Projector):
    """The leading singular vectors; see `svd`."""

    stored: bool = True

    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """Eigenvectors of G Gᵀ or GᵀG, whichever is smaller, taken to the projected side."""
        r = self.size(leaf)[1]
        m, n = leaf.shape[-2:]
        is_wide = m <= n
        gram = "...mn,...kn->...mk" if is_wide else "...mn,...mk->...nk"
        whole = turned(gradient, -2 if is_wide else -1)
        vectors = leading_eigenvectors(product(gram, whole, whole), min(r, m, n))
        if self.is_left(leaf) == is_wide:
            return vectors
        across = "...mn,...mr->...nr" if is_wide else "...mn,...nr->...mr"
        return orthonormal(product(across, gradient, vectors))

    def size(self, leaf: Leaf) -> tuple[int, int]:
        """The length of the projected side, and r, which a matrix has singular vectors for."""
        side, r = super().size(leaf)
        if r > min(leaf.shape[-2:]):
            m, n = leaf.shape[-2:]
            raise ValueError(
                f"rank must be at most {min(m, n)}, the number of singular vectors, for "
                f"{leaf.name!r}, whose matrices are {m}×{n}; got {r}."
            )
        return side, r


@dataclasses.dataclass(frozen=True)
class RandomizedSvd(Svd):
    """Nearly the leading singular vectors; see `randomized_svd`."""

    iterations: int = 2
    oversample: int = 8
    seed: int | Array = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("iterations", self.iterations, 0)
        check_at_least("oversample", self.oversample, 0)

    def basis(self, leaf: Leaf, gradient: Array, when: When) -> Array:
        """QR-based power iterations on a random sketch, then the singular vectors within."""
        m, n = leaf.shape[-2:]
        r = self.size(leaf)[1]
        across = n if self.is_left(leaf) else m
        k = min(r + self.oversample, m, n)
        shape = (k, across) if self.is_left(leaf) else (across, k)
        sketch = jax.random.normal(leaf.key(self.seed, when.refresh), shape, leaf.dtype)
        q = orthonormal(self.correlation(leaf, gradient, sketch))
        for _ in range(self.iterations):
            q = orthonormal(self.correlation(leaf, gradient, self.down(leaf, q, gradient)))
        low = self.down(leaf, q, gradient)
        turn = leading_eigenvectors(self.gram(leaf, low, low), r)
        return product("...mr,...rs->...ms", q, turn)


def svd(rank: int | float, *, side: str = "short") -> Projector:
    """The leading r singular vectors of the gradient at each refresh.

    They are the eigenvectors of the p×p Gram matrix of the shorter side, p. Where that side is
    sharded, forming it moves each device's part of the gradient to others; under Auto axes XLA
    gathers the whole gradient for it. `randomized_svd` never does, and costs far less. The
    basis is kept: side×r numbers a matrix.

    Args:
      rank: r, or a fraction of each matrix's shorter side.
      side: "short", "long", "left" or "right".

    Raises:
      ValueError: if `rank` is below one, or larger than the matrix's shorter side.

    References:
      Zhao et al., GaLore, 2024, https://arxiv.org/abs/2403.03507, section 4.

    Example:
      >>> import jax.numpy as jnp
      >>> g = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
      >>> p = svd(2).basis(Leaf("w", (3, 3), jnp.float32), g, When.first())
      >>> jnp.abs(p.T @ g).max(1).tolist()
      [3.0, 2.0]
    """
    return Svd(rank, side)


def randomized_svd(
    rank: int | float,
    *,
    side: str = "short",
    iterations: int = 2,
    oversample: int = 8,
    seed: int | Array = 0,
) -> Projector:
    """Nearly the leading r singular vectors, by a few passes over the gradient.

    A random sketch of r + oversample columns goes through power iterations with a QR each,
    then the singular vectors within their span are taken. Nothing larger than side×(r +
    oversample) is factorised. The basis is kept: side×r numbers a matrix.

    Args:
      rank: r, or a fraction of each matrix's shorter side.
      side: "short", "long", "left" or "right".
      iterations: power iterations, two passes over the gradient each.
      oversample: columns of the sketch beyond r.
      seed: what the sketches depend on, besides parameter and refresh.

    Raises:
      ValueError: if `rank` is below one, or larger than the matrix's shorter side.

    References:
      Halko, Martinsson & Tropp, Finding structure with randomness, 2011,
      https://arxiv.org/abs/0909.4061, Algorithm 4.4.

    Example:
      >>> import jax.numpy as jnp
      >>> g = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
      >>> p = randomized_svd(2).basis(Leaf("w", (3, 3), jnp.float32), g, When.first())
      >>> jnp.round(jnp.abs(p.T @ g).max(1)).tolist()
      [3.0, 2.0]
    """
    return RandomizedSvd(rank, side, True, iterations, oversample, seed)
