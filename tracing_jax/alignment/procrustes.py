"""The linear map from activations of ft to base's, in closed form and equivariant under maps of ft's activations.

The weights that write some activations are multiplied by M, those that read them by M^-T, so that the scale of either
alone is arbitrary. First both models are transformed to the gauge in which the Gram matrices of writing and reading
weights are equal (balanced), which leaves an orthogonal map free; then orthogonal Procrustes, on writing and reading
weights together, determines it. Disguising ft by N multiplies both gauge and solution by N^-1, exactly, so the aligned
weights stay the same. Least squares on the writing weights alone is equivariant too, but shrinks them towards zero
where ft is noisy, and inflates the reading weights.

Letters: K parents (kv heads), H activations of each, n and m weights that write and read each.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

from tracing_jax.alignment.float64_leaves import cosine

_LEAST_EIGENVALUE = 1e-12
"""Relative to the greatest: below, float64 does not distinguish a Gram matrix from a singular one."""


@dataclass(frozen=True)
class AdjacentWeights:
    """The weights that write some activations and those that read them, one row for each activation.

    Attributes:
      writes: the weights that write an activation.
      reads: the weights that read it.
    """

    writes: Num[np.ndarray, "*_ n"]
    reads: Num[np.ndarray, "*_ m"]


def positive_factors(base: AdjacentWeights, ft: AdjacentWeights, degree: int) -> Float[np.ndarray, "*_"]:
    """Returns for each activation that grows by a power of the factor c the c of `c * ft.writes` and `ft.reads / c^p`.

    Where writing weights are zero in one of the models, c follows from the reading weights, and vice versa; where both
    are, c is 1.
    """
    w_b, r_b, w_f, r_f = (np.linalg.norm(x, axis=-1) for x in (base.writes, base.reads, ft.writes, ft.reads))
    writes, reads = (w_b > 0) & (w_f > 0), (r_b > 0) & (r_f > 0)
    grown = np.divide(w_b, w_f, out=np.ones_like(w_b), where=writes)
    shrunk = np.divide(r_f, r_b, out=np.ones_like(r_b), where=reads) ** (1 / degree)
    return np.where(writes & reads, np.sqrt(grown * shrunk), grown * shrunk)


def scale_factors(base: AdjacentWeights, ft: AdjacentWeights) -> Num[np.ndarray, "*_"]:
    """Returns for each single activation the c, real or complex, of `c * ft.writes` and `ft.reads / conj(c)`.

    Its size is that of `positive_factors`, its sign or phase that in which both agree best.
    """
    return positive_factors(base, ft, 1) * _phase(cosine(base.writes, ft.writes) + cosine(base.reads, ft.reads))


def mixing_matrices(base: AdjacentWeights, ft: AdjacentWeights) -> tuple[Float[np.ndarray, "K H H"], list[int]]:
    """Returns for each parent the M of `M @ ft.writes` and `M^-T @ ft.reads`, and the degenerate parents.

    These have a singular Gram matrix in one of the models, and M is the identity.
    """
    found, degenerate = [], []
    for k, (w_b, r_b, w_f, r_f) in enumerate(zip(base.writes, base.reads, ft.writes, ft.reads, strict=True)):
        gauge_b, gauge_f = _balanced(w_b, r_b), _balanced(w_f, r_f)
        if gauge_b is None or gauge_f is None:
            degenerate.append(k)
            found.append(np.eye(len(w_b)))
            continue
        (a_b, back_b), (a_f, back_f) = gauge_b, gauge_f
        cross = a_b @ (w_b @ w_f.T) @ a_f.T + back_b.T @ (r_b @ r_f.T) @ back_f
        found.append(back_b @ polar(cross) @ a_f)
    return np.stack(found), degenerate


def polar(x: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N N"]:
    """Returns the orthogonal Q of greatest `trace(Q^T x)`: the one nearest to x.

    Source: Schoenemann 1966, the orthogonal Procrustes problem.
    """
    u, _, vt = np.linalg.svd(x)
    return u @ vt


def _balanced(
    writes: Float[np.ndarray, "H n"], reads: Float[np.ndarray, "H m"]
) -> tuple[Float[np.ndarray, "H H"], Float[np.ndarray, "H H"]] | None:
    """Returns A and A^-1 with equal Gram matrices of `A @ writes` and `A^-T @ reads`; None if they are singular.

    Source: balanced realisations of linear systems, Moore 1981.
    """
    gram = writes @ writes.T
    if _is_singular(np.linalg.eigvalsh(gram)):
        return None
    root = np.linalg.cholesky(gram)
    values, vectors = np.linalg.eigh(root.T @ (reads @ reads.T) @ root)
    if _is_singular(values):
        return None
    fourth = values**0.25
    return fourth[:, None] * np.linalg.solve(root.T, vectors).T, root @ (vectors / fourth)


def _is_singular(eigenvalues: np.ndarray) -> bool:
    return bool(eigenvalues[0] <= _LEAST_EIGENVALUE * eigenvalues[-1])


def _phase(x: Num[np.ndarray, "*_"]) -> Num[np.ndarray, "*_"]:
    return np.divide(x, np.abs(x), out=np.ones_like(x), where=x != 0)
