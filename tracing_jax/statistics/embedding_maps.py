"""Rows of tokens in embedding and head, and the linear map of features that takes those of one model to the other's.

Letters: S tokens, D features.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from tracing_jax.arch import Arch
from tracing_jax.rewrites import gain_offset
from tracing_jax.sources import ParamSource
from tracing_jax.tree import taken, to_host

TokenMatrix = Literal["embedding", "head"]

_RIDGE = 1e-6
"""Of the mean variance of a feature: keeps least squares defined where tokens are fewer than features."""


def token_matrices(base: Arch, ft: Arch) -> tuple[TokenMatrix, ...]:
    """Returns the parts with a row for each token that both models have of their own: a tied head has none."""
    return ("embedding",) if base.tied or ft.tied else ("embedding", "head")


def token_rows(model: ParamSource, part: TokenMatrix, ids: Int[np.ndarray, " S"]) -> Float[np.ndarray, "S D"]:
    """Returns the rows of these tokens in the embedding, or in an untied head times the gain of the final norm.

    A rotation of the residual stream turns both by the same matrix; a change of that gain leaves both as they are.
    """
    if part == "embedding":
        return np.asarray(to_host(taken(model.embed()["embedding"], ids)), np.float64)
    head = model.head()
    rows = np.asarray(to_host(taken(head["lm_head"]["kernel"], ids, axis=1)), np.float64).T
    scale = head.get("norm", {}).get("scale")
    return rows if scale is None else rows * (np.asarray(to_host(scale), np.float64) + gain_offset(model.arch))


def feature_map(x: Float[np.ndarray, "S D"], y: Float[np.ndarray, "S D2"]) -> Float[np.ndarray, "D D2"]:
    """Returns the M of `x @ M` near y, both centred over the tokens: orthogonal if D = D2, else by least squares.

    The order of tokens, and a scale of either side, change nothing but the scale of a least squares map. Where x and y
    are multiplied by orthogonal P and Q, M becomes `P^T M Q`.

    In float64; at D = 4,096 the singular value decomposition takes about a minute on two cores.

    Source: Schoenemann 1966, the orthogonal Procrustes problem.
    """
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    cross = x.T @ y
    if x.shape[1] == y.shape[1]:
        u, _, vt = np.linalg.svd(cross)
        return u @ vt
    gram = x.T @ x
    ridge = _RIDGE * np.trace(gram) / len(gram)
    return np.linalg.solve(gram + ridge * np.eye(len(gram)), cross)
