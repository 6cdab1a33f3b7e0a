"""Query heads in signatures: how heads attend to token strings, and what they write.

A head has two forms over T tokens: `A = E W_Q^T W_K E^T` and `B = E W_O W_V E^T`, where E are the rows of the input
embedding, of length one. Both are centred over the tokens on either side, so that the forms on some of the tokens
follow from those on all. No rewrite of the residual stream or inside a head changes them, MLPs do not enter, and the
head of the model is not read.

Letters: N query heads, T tokens.

Source: ours, as `match_heads`, whose second form is over the head of the model. The products are the QK and OV circuits
of Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int8

from tracing_jax.arch import Arch
from tracing_jax.library import drawing
from tracing_jax.library.readings import has_moments, normalised_tokens
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.head_kernels import HEAD_LEAVES, adds_next_to_nothing, gates_not_applicable
from tracing_jax.statistics.head_matrices import head_matrices_of
from tracing_jax.statistics.shared_tokens import rows_of_tokens

HEAD_FORMS = ("attention", "output")

_REPEATED = 0.9
"""Correlation of both forms of two heads, above which they are counted as one."""

HeadForms = Mapping[str, Int8[np.ndarray, "N T2"]]
"""Each of `HEAD_FORMS` -> for all heads of a layer the form, each up to a positive factor."""


@dataclass(frozen=True)
class SampledHeads:
    """The sampled query heads of one layer.

    Attributes:
      layer: its index in the model.
      heads: N indices of query heads, in the order of kv heads and the queries of each.
      forms: each of `HEAD_FORMS` -> those of the heads on the first tokens of the signature.
    """

    layer: int
    heads: Int[np.ndarray, " N"]
    forms: HeadForms


def heads_not_readable(model: ParamSource) -> str | None:
    """Returns why the heads of a model are not in its signature; None if they are."""
    arch = model.arch
    if not has_moments(model):
        return "it is read by its weights alone"
    if arch.num_kv_heads * arch.q_group < 2:
        return "it has one head per layer"
    if not layers_with_heads(arch):
        return "no layer has attention with keys of its own"
    if reasons := gates_not_applicable(arch, arch):
        return reasons[0].partition(": ")[2]
    return None


def layers_with_heads(arch: Arch) -> list[int]:
    """Returns the layers whose heads can be compared."""
    return [i for i in range(arch.num_layers) if arch.has_attention(i)]


def sampled_head_layers(arch: Arch) -> list[int]:
    """Returns the layers whose heads a signature samples."""
    places = layers_with_heads(arch)
    return [places[i] for i in drawing.sampled_layers(len(places))] if places else []


def head_forms(model: ParamSource, ids: Int[np.ndarray, " T"]) -> Callable[[int], HeadForms]:
    """Returns a function of the layer that gives both forms of all its heads on these tokens.

    A head that writes next to nothing beside the others of its layer has an output of zero, and so have all heads of a
    layer whose attention adds next to nothing to the residual stream: they could be another model's, planted.
    """
    tokens = normalised_tokens(rows_of_tokens(model, ids, with_effect=False))

    def read(layer: int) -> HeadForms:
        params = model.layer(layer, HEAD_LEAVES)
        found = head_matrices_of(params, model.arch, tokens)
        if adds_next_to_nothing(model, layer, params):
            found = {**found, "output": np.zeros_like(found["output"])}
        return {name: _as_int8(found[name]) for name in HEAD_FORMS}

    return read


def _as_int8(forms: Float[np.ndarray, "N T2"]) -> Int8[np.ndarray, "N T2"]:
    largest = np.abs(forms).max(axis=1, keepdims=True, initial=0.0)
    return np.round(forms * (127 / np.where(largest > 0, largest, 1.0))).astype(np.int8)


def sampled_heads(layer: int, forms: HeadForms, key: bytes) -> SampledHeads | None:
    """Returns heads drawn from those that write something; None if there are fewer than two of these."""
    kept = np.flatnonzero(np.all([np.any(found, axis=1) for found in forms.values()], axis=0))
    if len(kept) < 2:
        return None
    drawn = drawing.drawn_units(kept, key, layer, drawing.HEADS)
    return SampledHeads(layer, drawn.astype(np.int32), {name: found[drawn] for name, found in forms.items()})


def forms_on(forms: Int8[np.ndarray, "N T2"], tokens: Sequence[int]) -> Float[np.ndarray, "N S2"]:
    """Returns the forms on some of their tokens, centred on either side and of length 1; those of no length are 0."""
    T = round(forms.shape[1] ** 0.5)
    found = forms.reshape(len(forms), T, T)[:, tokens][:, :, tokens].astype(np.float32)
    found -= found.mean(axis=1, keepdims=True)
    found -= found.mean(axis=2, keepdims=True)
    found = found.reshape(len(forms), -1)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.where(length > 0, length, 1.0)


def without_repeats(
    layers: Mapping[int, Mapping[str, Float[np.ndarray, "N S2"]]],
) -> dict[int, dict[str, Float[np.ndarray, "_ S2"]]]:
    """Returns layers without the heads that repeat an earlier one in both forms, and without layers of fewer than two.

    Layers of a looped or an enlarged model repeat others, and made-up ones can: they find the same heads again.

    Args:
      layers: layer -> each form of its heads, centred and of length 1 (`forms_on`).
    """
    found: dict[int, dict[str, Float[np.ndarray, "_ S2"]]] = {}
    seen: list[Mapping[str, Float[np.ndarray, "N S2"]]] = []
    for layer, forms in layers.items():
        seen.append(forms)
        N = len(forms[HEAD_FORMS[0]])
        earlier = {name: np.concatenate([other[name] for other in seen]) for name in HEAD_FORMS}
        alike = np.min([forms[name] @ earlier[name].T for name in HEAD_FORMS], axis=0) > _REPEATED
        before = np.arange(alike.shape[1])[None, :] < alike.shape[1] - N + np.arange(N)[:, None]
        kept = ~(alike & before).any(axis=1)
        if kept.sum() > 1:
            found[layer] = {name: forms[name][kept] for name in HEAD_FORMS}
    return found
