"""`match_heads`: do the matchings of query heads, by how they attend to tokens and by what they write, agree?"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.progress import tqdm
from tracing_jax.rewrites import gain_offset
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.agreement import PairAgreements, agreements, nulls_of
from tracing_jax.statistics.calibration import BY_CONVERGENCE, MARGIN, Null
from tracing_jax.statistics.comparison import (
    Comparison,
    all_reserved,
    bonferroni_log10,
    one_test,
    reserved,
    share_agreeing,
    share_by_layer,
)
from tracing_jax.statistics.distinct_units import inactive_below
from tracing_jax.statistics.head_kernels import (
    HEAD_LEAVES,
    gates_not_applicable,
    head_kernels,
    inactive_attention,
    without_effect,
)
from tracing_jax.statistics.head_null import heads_log_sf
from tracing_jax.statistics.mlp_rows import centred_directions, gain_of, unit_length
from tracing_jax.statistics.shared_tokens import TokenRows, shared_token_rows, tokens_not_applicable, with_doubts
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies, depths_not_applicable
from tracing_jax.tree import Tree, to_host

HeadMatrices = Mapping[str, Float[np.ndarray, "heads S2"]]
"""`attention`, `output` -> the matrix of each query head over pairs of tokens, centred both ways, of length one."""

_PAIRS = [("attention", "output")]
_NAME = "attention and output"
_SUM = "agreement summed over layers"
_TOKENS = 192  # at most; time grows with their square
_MOST_CONTROLS = 256
_DEVIATIONS = 8.0  # standard deviations that the score of a head may come to
_SAME_ATTENTION = 0.99  # correlation of what two heads of a layer attend to, which are then one
_EVEN_ATTENTION = 0.01  # deviation of scores between tokens, below which a head attends to all alike
_LOG_POSITIONS = 16.0  # of nine million positions, whose scores are summed against a sink


@dataclass(frozen=True)
class MatchHeads(options.MatchHeads):
    """Unconstrained test on attention: do the matchings of heads by their QK and by their OV products agree?

    A query head has two matrices on shared tokens: `A = E W_Q^T W_K E^T`, how each token attends to each other at one
    position, and `B = W_U W_O W_V E^T`, what it then writes to the head of the model. E are the input embeddings, W_U
    the rows of the head with the gain of the final norm, both centred over the tokens and of length one; query, key and
    value have the gain of the norm before them. The heads of layers of equal index are matched by A and apart by B, and
    agreement is summed over all layers.

    The null is calibrated as in `calibration.py`; its chance part is the agreement of random matchings that keep the
    queries of a kv head together, which is more variable than that of free ones (`head_null`). The number of heads
    bounds how small the p-value can be.

    Unchanged under every rewrite of the residual stream, permutations of kv heads and of the queries of one, mixing of
    values, and maps of queries and keys that commute with RoPE. MLPs do not enter. Costs less than reading the weights.

    Attributes:
      level: of the verdict; the allowance that control models give is a bound for it.

    Source: ours. The products are the QK and OV circuits of Elhage et al. 2021, A Mathematical Framework for
    Transformer Circuits.
    """

    level: float = options.RunOptions.level

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why heads of layers of equal index cannot be matched; empty if they can."""
        lines = depths_not_applicable(base, ft, "see match_all") + tokens_not_applicable(base, ft, vocabularies)
        for side, arch in (("base", base), ("ft", ft)):
            if arch.num_kv_heads * arch.q_group < 2:
                lines.append(f"{side} has one head per layer: there is nothing to match")
        lines += gates_not_applicable(base, ft)
        if not lines and len(_layers(base, ft)) < 2:
            lines.append("fewer than two layers have attention in both models")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the calibrated and the parametric test; no forward pass."""
        compared = self._compared(pair, "pair")
        null = nulls_of(compared, pair, self._compared, self.level)[_NAME]
        layers = compared.of(_NAME)[0]
        places = [f"layer {i}" for i in _layers(pair.base.arch, pair.ft.arch)]
        tests = _tests(layers, null, groups_of(pair.base.arch, pair.ft.arch), places)
        notes = [*null.notes]
        if pair.base.arch.qk_norm or pair.ft.arch.qk_norm:
            notes.append(
                "queries and keys are normalised in each head: their product is approximate on centred embeddings"
            )
        if pair.base.arch.head_gate or pair.ft.arch.head_gate:
            notes.append("what heads write is gated, token by token: the gates are left out")
        if pair.base.arch.latent or pair.ft.arch.latent:
            notes.append("heads read latents: the norms of these, a number for each token, are left out")
        result = Result(
            headline=share_agreeing(layers),
            label="heads on which attention and output agree, share",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null={_NAME: null.as_dict()},
            per_layer=share_by_layer(layers),
            notes=notes,
            effect=_effect(layers),
            **reserved(tests, BY_CONVERGENCE),
        )
        if pair.base.arch.alibi_slopes and pair.ft.arch.alibi_slopes:
            result = all_reserved(result, "heads of one slope of ALiBi may do alike in independent models")
        return with_doubts(result, pair).for_pair(pair)

    def _compared(self, pair: Pair, name: str) -> PairAgreements:
        """Returns the agreement of the heads of each layer, and of control pairs of layers."""
        rows = shared_token_rows(pair, _TOKENS, "match_heads")
        tokens = [TokenRows(*map(centred_directions, side)) for side in rows]
        bar = tqdm(_layers(pair.base.arch, pair.ft.arch), desc="match_heads", unit="layer", disable=None)
        matrices = [
            tuple(head_matrices(model, i, own) for model, own in zip((pair.base, pair.ft), tokens)) for i in bar
        ]

        def compare(i: int, j: int) -> dict[str, Comparison]:
            ours, theirs = matrices[i][0], matrices[j][1]
            found = {side: ours[side] @ theirs[side].T for side in ours}
            return agreements(found, _PAIRS, pair, ("match_heads", name, i, j))

        places = control_places(len(matrices), pair.generator("match_heads", "controls"))
        return PairAgreements([compare(i, i) for i in range(len(matrices))], [compare(i, j) for i, j in places])


def _effect(layers: Sequence[Comparison]) -> str:
    return (
        f"{sum(c.agreeing for c in layers)} of {sum(c.units for c in layers)} heads agree; in 2,120 pairs "
        "of independent models at most 14 of 16 did, 4.4 on average (docs/nulls.md)"
    )


def control_places(num_layers: int, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Returns up to 256 pairs of different layers: with their few heads, few layers say little about chance."""
    every = [(i, j) for i in range(num_layers) for j in range(num_layers) if i != j]
    return [every[at] for at in generator.permutation(len(every))[:_MOST_CONTROLS]]


def groups_of(base: Arch, ft: Arch) -> tuple[int, int]:
    """Returns the number of kv heads and of queries in each, as few kv heads as either model has."""
    K, heads = min(base.num_kv_heads, ft.num_kv_heads), min(a.num_kv_heads * a.q_group for a in (base, ft))
    return K, -(-heads // K)


def head_matrices(model: ParamSource, layer: int, tokens: TokenRows) -> HeadMatrices:
    """Returns the two matrices of every query head of a layer, heads in the order of kv heads and queries.

    A head that writes next to nothing could be another model's, planted: its output is zero, so that it takes no part.
    So is that of heads of a layer that attend alike, which could cancel one another, and of those without an effect on
    the logits of a text.
    """
    found = head_matrices_of(model.layer(layer, HEAD_LEAVES), model.arch, tokens)
    takes_part = ~without_effect(model, layer) if layer not in inactive_attention(model) else np.zeros(1, bool)
    return {**found, "output": found["output"] * takes_part[:, None]}


def head_matrices_of(params: Tree, arch: Arch, tokens: TokenRows) -> HeadMatrices:
    """Returns the two matrices of every query head, as `head_matrices`, by the weights of the layer alone."""
    before, after = gain_of(params, "attn_norm", arch), gain_of(params, "attn_post_norm", arch)
    kernels = head_kernels(params, arch)
    scales = {name: params["attn"][f"{name}_norm"]["scale"] for name in "qk" if arch.qk_norm is not None}
    found = to_host(_head_matrices(tokens, kernels, (before, after), scales, arch.qk_norm, gain_offset(arch)))
    attention, output, written = found["attention"], np.array(found["output"]), found["written"]
    if arch.sinks:  # a head whose sink is above its scores writes nothing either
        sinks = np.asarray(to_host(params["attn"]["sinks"]), np.float64)
        written = written * (sinks < _largest_scores(kernels, before, arch)).ravel()
    output[written <= inactive_below(written)] = 0.0
    # Heads that attend alike can cancel one another, so that nothing is written: they could be another model's.
    alike = attention @ attention.T > _SAME_ATTENTION
    even = arch.attention_scale * found["scores"] < _EVEN_ATTENTION
    output[(alike.sum(axis=1) > 1) | even] = 0.0
    return {"attention": attention, "output": output}


def _largest_scores(
    kernels: Mapping[str, Array], gain: Float[Array, " D"] | float, arch: Arch
) -> Float[np.ndarray, "K G"]:
    """Returns what a sink must exceed to take all attention of a head, for inputs in random directions."""
    scaled = {
        name: kernels[name] * jnp.reshape(jnp.asarray(gain), (-1,) + (1,) * (kernels[name].ndim - 1)) for name in "qk"
    }
    queries = jnp.einsum("dkgh,dkgi->kghi", scaled["q"], scaled["q"], precision="highest")
    keys = jnp.einsum("dkh,dki->khi", scaled["k"], scaled["k"], precision="highest")
    variance = np.maximum(to_host(jnp.einsum("kghi,khi->kg", queries, keys, precision="highest")), 0)
    return np.asarray(_DEVIATIONS * arch.attention_scale * np.sqrt(variance) + _LOG_POSITIONS, np.float64)


@functools.partial(jax.jit, static_argnames=("qk_norm", "offset"))
def _head_matrices(
    tokens: TokenRows,
    kernels: Mapping[str, Float[Array, "..."]],
    gains: tuple[Float[Array, "..."], Float[Array, "..."]],
    scales: Mapping[str, Float[Array, "..."]],
    qk_norm: str | None,
    offset: float,
) -> dict[str, Float[Array, "..."]]:
    """Returns both matrices of the heads, each of length one, as `written` the length that the output had.

    And as `scores` the root mean square of those of inputs behind a norm, before they are scaled.
    """
    read, effect = tokens.read * gains[0], tokens.effect * gains[1]
    queries, keys = (jnp.tensordot(read, kernels[name], 1, precision="highest") for name in "qk")
    if qk_norm is not None:
        queries, keys = (
            _normalised(side, scales[name], qk_norm, offset) for name, side in (("q", queries), ("k", keys))
        )
    values = jnp.tensordot(read, kernels["v"], 1, precision="highest")
    outputs = jnp.einsum("sd,kghd->skgh", effect, kernels["o"], precision="highest")
    attention, output = _centred_products(queries, keys), _centred_products(outputs, values)
    # Rows have length one, and those that a norm gives the root of the number of features; after norms of queries and
    # keys that does not matter.
    size = read.shape[1] if qk_norm is None else 1
    scores = size * jnp.sqrt(jnp.square(attention).mean(axis=1))
    written = jnp.linalg.norm(output, axis=1)
    return {
        "attention": unit_length(attention),
        "output": unit_length(output),
        "written": written,
        "scores": scores,
    }


def _normalised(heads: Array, scale: Array, qk_norm: str, offset: float) -> Array:
    """Returns queries `[S, K, G, H]` or keys `[S, K, H]` after their norm."""
    axes = tuple(range(1, heads.ndim)) if qk_norm == "all" else (-1,)
    length = jnp.sqrt(jnp.square(heads).mean(axes, keepdims=True))
    return jnp.where(length > 0, heads / jnp.where(length > 0, length, 1.0), 0.0) * (scale.astype(jnp.float32) + offset)


def _centred_products(ours: Float[Array, "S K G H"], theirs: Float[Array, "T K H"]) -> Float[Array, "K*G S*T"]:
    """Returns for each query head the products of two sides, each centred over the tokens."""
    ours, theirs = ours - ours.mean(axis=0), theirs - theirs.mean(axis=0)
    products = jnp.einsum("skgh,tkh->kgst", ours, theirs, precision="highest")
    return products.reshape(products.shape[0] * products.shape[1], -1)


def _layers(base: Arch, ft: Arch) -> list[int]:
    """Returns the layers in which both models have attention."""
    return [i for i in range(base.num_layers) if base.has_attention(i) and ft.has_attention(i)]


def _tests(layers: Sequence[Comparison], null: Null, groups: tuple[int, int], places: Sequence[str]) -> list[Test]:
    """Returns the calibrated test, which enters the verdict, and one without allowance and controls."""
    tests = []
    for name, u, lam in (("calibrated", null.u, null.lam), ("parametric", [0.0] * len(layers), 1.0)):
        single = [heads_log_sf([found.agreeing], *groups, [share], lam) for found, share in zip(layers, u)]
        total = heads_log_sf([found.agreeing for found in layers], *groups, u, lam)
        combine = functools.partial(_constant, total)
        test = one_test(f"{_NAME}, agreement, {name}", layers, single, places, combine, _SUM)
        tests.append(replace(test, decides=name == "calibrated"))
    firm = tests[0].log10_p if share_agreeing(layers) > MARGIN * max(null.u) else 0.0
    return [replace(tests[0], firm_log10_p=firm, calibrated=True), *tests[1:]]


def _constant(value: float, _: object) -> float:
    return value
