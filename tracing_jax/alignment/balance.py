"""The map that brings activations of ft to base's: closed forms that do not depend on how ft's were mapped before.

What writes some activations takes M and what reads them M^-T, so that the length of either alone means nothing. First
both models are brought to the gauge in which the writers' and the readers' Gram matrices are equal, which leaves an
orthogonal map undecided; then Procrustes decides it, on writers and readers together. Disguising ft by N multiplies
both gauge and solution by N^-1, exactly: what is aligned stays the same. Least squares on the writers alone would do so
too, but shrinks them towards zero where ft is noisy, and stretches the readers.

Letters: K holders (kv heads), H activations of each, n and m other numbers of the writers and the readers.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

_LEAST_EIGENVALUE = 1e-12
"""Relative to the greatest: below, float64 does not tell a Gram matrix from a singular one."""


@dataclass(frozen=True)
class Sides:
    """The weights around some activations, one row for each.

    Attributes:
      writes: rows of what makes them.
      reads: rows of what takes them.
    """

    writes: Num[np.ndarray, "*_ n"]
    reads: Num[np.ndarray, "*_ m"]


def factors(base: Sides, ft: Sides) -> Num[np.ndarray, "*_"]:
    """Returns for each single activation the c, real or complex, of `c * ft.writes` and `ft.reads / conj(c)`.

    An activation that is dead on one side is measured on the other; one that is dead in either model keeps its c of 1.
    """
    w_b, r_b, w_f, r_f = (np.linalg.norm(x, axis=-1) for x in (base.writes, base.reads, ft.writes, ft.reads))
    writes, reads = (w_b > 0) & (w_f > 0), (r_b > 0) & (r_f > 0)
    grown = np.divide(w_b, w_f, out=np.ones_like(w_b), where=writes)
    shrunk = np.divide(r_f, r_b, out=np.ones_like(r_b), where=reads)
    size = np.where(writes & reads, np.sqrt(grown * shrunk), grown * shrunk)
    return size * _phase(_cosine(base.writes, ft.writes) + _cosine(base.reads, ft.reads))


def matrices(base: Sides, ft: Sides) -> tuple[Float[np.ndarray, "K H H"], list[int]]:
    """Returns for each holder the M of `M @ ft.writes` and `M^-T @ ft.reads`, and which holders have none.

    A holder whose activations do not depend on H independent numbers in either model keeps M = 1.
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


def _cosine(x: Num[np.ndarray, "*_ n"], y: Num[np.ndarray, "*_ n"]) -> Num[np.ndarray, "*_"]:
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    products = (x * y.conj()).sum(-1)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def _phase(x: Num[np.ndarray, "*_"]) -> Num[np.ndarray, "*_"]:
    return np.divide(x, np.abs(x), out=np.ones_like(x), where=x != 0)
