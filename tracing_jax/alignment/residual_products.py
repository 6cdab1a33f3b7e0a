"""Cross products of the hidden states of two models that read the same text: which rotation of one is the other."""

from collections.abc import Collection

import numpy as np
from jaxtyping import Float, Int

from tracing_jax.alignment.rewrite_estimation import canonical
from tracing_jax.data import paired_one_to_one
from tracing_jax.forward import activations
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource, rewritten

_POSITIONS = 8192
"""At most so many positions of the text are compared."""

_TAPS = ("residual", "mlp_input")


def residual_products(
    base: ParamSource,
    ft: ParamSource,
    kinds: Collection[str],
    tokens: Int[np.ndarray, "N T"],
    compute: Compute,
    seed: int = 0,
) -> Float[np.ndarray, "D D"]:
    """Returns the cross covariance `base.T @ ft` of hidden states, each normalised to one, the mean over all layers.

    Hidden states are taken before a layer and before its MLP, with gains folded away where `kinds` include them, and
    divided by their length, as a norm does. A rotation or a permutation of ft's features then multiplies the result
    from the right by its inverse. The mean over the text is taken out: it is one direction, of much weight, that tells
    nothing of the tokens.
    """
    blocks = paired_one_to_one(tokens, tokens).sampled(_POSITIONS, np.random.default_rng([seed, len(tokens)]))
    layers = [
        activations(
            rewritten(source, canonical(source, kinds)),
            tokens, blocks.at_base, blocks.valid, _TAPS, compute, f"hidden states of {side}",
        )
        for side, source in (("base", base), ("ft", ft))
    ]  # fmt: skip
    total = np.zeros((base.arch.embed_dim,) * 2)
    for (_, of_base), (_, of_ft) in zip(*layers, strict=True):
        for tap in _TAPS:
            x, y = _centred(of_base[tap]), _centred(of_ft[tap])
            norms = float(np.linalg.norm(x) * np.linalg.norm(y))
            total += x.T @ y / norms if norms > 0 else 0.0
    return total / (len(_TAPS) * base.arch.num_layers)


def _centred(x: Float[np.ndarray, "S D"]) -> Float[np.ndarray, "S D"]:
    x = np.asarray(x, np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    return x - x.mean(axis=0)
