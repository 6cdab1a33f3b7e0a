"""Merges as mergekit makes them, in plain numpy on leaves by name, for tests to compare with.

Source: arcee-ai/mergekit, merge_methods/{linear,slerp,generalized_task_arithmetic}.py and sparsify.py.
"""

import numpy as np


def linear(parents, weights, normalize=True):
    total = sum(weights) if normalize else 1.0
    return {name: sum(w * p[name] for w, p in zip(weights, parents)) / total for name in parents[0]}


def slerp(a, b, t):
    return {name: _slerp(t, a[name], b[name]) for name in a}


def task_arithmetic(origin, parents, weights):
    return _mixed(origin, parents, lambda name, deltas: sum(w * d for w, d in zip(weights, deltas)))


def ties(origin, parents, weights, density):
    def mix(name, deltas):
        kept = [_largest(delta, density) for delta in deltas]
        weighted = [w * d for w, d in zip(weights, kept)]
        masks = _agree(weighted)
        divisor = sum(w * mask for w, mask in zip(weights, masks))
        return sum(d * mask for d, mask in zip(weighted, masks)) / np.where(divisor == 0, 1, divisor)

    return _mixed(origin, parents, mix)


def dare_linear(origin, parents, weights, density, seed=0):
    return _dare(origin, parents, weights, density, seed, elect=False)


def dare_ties(origin, parents, weights, density, seed=0):
    return _dare(origin, parents, weights, density, seed, elect=True)


def _dare(origin, parents, weights, density, seed, elect):
    rng = np.random.default_rng(seed)

    def mix(name, deltas):
        weighted = [w * _rescaled(d, rng.random(d.shape) < density) for w, d in zip(weights, deltas)]
        masks = _agree(weighted) if elect else [1] * len(weighted)
        return sum(d * mask for d, mask in zip(weighted, masks))

    return _mixed(origin, parents, mix)


def _mixed(origin, parents, mix):
    return {name: base + mix(name, [p[name] - base for p in parents]) for name, base in origin.items()}


def _largest(delta, density):
    kept = np.zeros(delta.size, bool)
    kept[np.argsort(-np.abs(delta).ravel(), kind="stable")[: int(density * delta.size)]] = True
    return delta * kept.reshape(delta.shape)


def _rescaled(delta, mask):
    """DARE keeps the sum of absolute values, which for many entries is a division by the density."""
    kept = np.abs(delta * mask).sum()
    return delta * mask * (np.abs(delta).sum() / kept if kept > 1e-7 else 1.0)


def _agree(weighted):
    elected = np.where(sum(weighted) >= 0, 1, -1)
    return [np.sign(d) == elected for d in weighted]


def _slerp(t, a, b):
    cosine = (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
