"""The MLP of a block, or a mixture of experts with a router, beside which there may be one that every token passes.

Letters: B batch, T position, D embed, F mlp, E experts, N groups of experts, k experts of a token.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.models.layers import ACTIVATIONS, einsum, linear, norm, scaled
from tracing_jax.tree import Tree

_KERNELS = ("gate_proj", "up_proj", "down_proj")

_GROUP = 128
"""Tokens that an expert computes at a time where each computes only those it is selected for."""


def mlp(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], taps: Collection[str] = (), grouped: bool = False
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T *units"]]]:
    """Returns the output of an MLP or a mixture of experts, and those of `gate`, `up` and `units` that are asked for.

    An MLP computes `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate; its units are the columns of up.

    Args:
      arch: the facts of the model.
      params: the subtree of the MLP.
      x: what it reads.
      taps: inner activations to return.
      grouped: whether experts may compute the tokens that they are selected for alone; see `_selected_experts`.

    Source: Shazeer 2020, GLU variants (arXiv 2002.05202).
    """
    if "router" in params:
        return _mixture(arch, params, x, taps, grouped)
    found = _inner(arch, params, x)
    y = linear(params["down_proj"], found["units"], "btf,fd->btd")
    return y, {tap: found[tap] for tap in taps if tap in found}


def mlp_inner(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], taps: Collection[str]
) -> dict[str, Float[Array, "B T *units"]]:
    """Returns `gate`, `up` or `units` of an MLP; only the weights that they are computed from need be there."""
    own = {name: leaves for name, leaves in params.items() if name in ("gate_proj", "up_proj")}
    if not _are_experts(own):
        found = _inner(arch, own, x)
        return {tap: found[tap] for tap in taps}

    x = _to_latent(params, x)

    def of_expert(own: Tree) -> dict[str, jax.Array]:
        found = _inner(arch, own, x)
        return {tap: found[tap] for tap in taps}

    return _experts_last(jax.lax.map(of_expert, own))


def _are_experts(params: Tree) -> bool:
    """Returns whether these projections are of several experts: their kernels are stacked."""
    return any(leaves["kernel"].ndim == 3 for leaves in params.values())


def _inner(arch: Arch, params: Tree, x: Float[Array, "B T D"]) -> dict[str, Float[Array, "B T F"]]:
    """Returns the pre-activations `gate` and `up` whose weights are given, and the `units` if they follow."""
    found = {tap: linear(params[f"{tap}_proj"], x, "btd,df->btf") for tap in ("up", "gate") if f"{tap}_proj" in params}
    activation = ACTIVATIONS[arch.activation]
    if arch.gated and len(found) == 2:
        if arch.clamped_glu is None:
            found["units"] = activation(found["gate"]) * found["up"]
        else:
            found["units"] = _clamped_glu(found["gate"], found["up"], *arch.clamped_glu)
    elif not arch.gated and "up" in found:
        found["units"] = activation(found["up"])
    return found


def _clamped_glu(gate: jax.Array, up: jax.Array, limit: float, slope: float) -> jax.Array:
    """Source: gpt-oss (arXiv 2508.10925), section 2.2."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(slope * gate)


def _mixture(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], taps: Collection[str], grouped: bool
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T E F"]]]:
    """Returns the sum of the k selected experts' MLPs weighted by the router, and inner activations of all experts.

    Source: Jiang et al. 2024, Mixtral of Experts (arXiv 2401.04088), section 2.1; the MLP that every token passes is
    that of DeepSeekMoE (arXiv 2401.06066).
    """
    total, found = _experts(arch, params, x, expert_weights(arch, params["router"], x), taps, grouped)
    if "shared" in params:
        total = total + _shared(arch, params, x)
    return total.astype(x.dtype), found


def mlp_and_experts(
    arch: Arch,
    layer: Tree,
    hidden: Float[Array, "B T D"],
    x: Float[Array, "B T D"],
    taps: Collection[str],
    grouped: bool = False,
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T E F"]]]:
    """Returns what `mlp` does where the experts, the MLP beside them and the router have norms of their own.

    Args:
      arch: the facts of the model.
      layer: the subtree of a layer.
      hidden: the hidden state.
      x: what the experts read of it.
      taps: inner activations of the experts.
      grouped: as for `mlp`.

    Source: Gemma 4, as transformers has it.
    """
    params = layer["mlp"]
    routed = scaled(norm(arch, layer["router_norm"], hidden), arch.embed_dim**-0.5)
    experts, found = _experts(arch, params, x, expert_weights(arch, params["router"], routed), taps, grouped)
    beside = _shared(arch, params, norm(arch, layer["shared_mlp_norm"], hidden)).astype(x.dtype)
    y = norm(arch, layer["shared_mlp_post_norm"], beside)
    return y + norm(arch, layer["expert_post_norm"], experts.astype(x.dtype)), found


def _experts(
    arch: Arch,
    params: Tree,
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T E"],
    taps: Collection[str],
    grouped: bool,
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T E F"]]]:
    """Returns the sum of what experts return times their weights, in float32, and inner activations of them all."""
    x = _to_latent(params, x)
    kernels = {name: params[name] for name in _KERNELS if name in params}
    found: dict[str, jax.Array] = {}
    if grouped and not taps and _saves_time(arch, weights):
        total = _selected_experts(arch, kernels, x, weights)
    else:
        total, found = _every_expert(arch, kernels, x, weights, taps)
    if "latent_out" in params:
        total = linear(params["latent_out"], total.astype(x.dtype), "btc,cd->btd").astype(jnp.float32)
    return total, found


def _saves_time(arch: Arch, weights: Float[Array, "B T E"]) -> bool:
    """Returns whether groups, of which the last of each expert is filled up, are at most half of all tokens."""
    B, T, E = weights.shape
    return 2 * (B * T * (arch.experts_per_token or E) + E * _GROUP) <= E * B * T


def _selected_experts(
    arch: Arch, kernels: Tree, x: Float[Array, "B T C"], weights: Float[Array, "B T E"]
) -> Float[Array, "B T C"]:
    """Returns the sum of what the selected experts return times their weights, each computing its own tokens alone.

    Tokens are sorted by expert and divided into groups of one expert each, so many that any choice of experts fits. The
    cost is k / E of that of `_every_expert`, and that of a group more for each expert.

    Source: as Gale et al. 2022, MegaBlocks (arXiv 2211.15841): no token is dropped. `jax.lax.ragged_dot` computes every
    expert for every token where there is no kernel for it, as on CPUs.
    """
    B, T, E = weights.shape
    N, k = B * T, arch.experts_per_token
    assert k is not None
    of_token = weights.reshape(N, E)
    _, selected = jax.lax.top_k(jnp.abs(of_token), k)
    chosen = jnp.take_along_axis(of_token, selected, axis=1)
    expert = selected.reshape(-1)
    count = jnp.bincount(expert, length=E)
    last_group = jnp.cumsum(-(-count // _GROUP))
    groups = N * k // _GROUP + E
    # The place of each token of an expert: those of one expert in a row, from the start of its first group.
    order = jnp.argsort(expert)
    sorted_expert = expert[order]
    first = (last_group - -(-count // _GROUP)) * _GROUP - (jnp.cumsum(count) - count)
    place = jnp.zeros_like(expert).at[order].set(first[sorted_expert] + jnp.arange(N * k))
    token = jnp.full(groups * _GROUP, N).at[place].set(jnp.arange(N * k) // k)  # places that are left read zeros
    scale = jnp.zeros(groups * _GROUP, weights.dtype).at[place].set(chosen.reshape(-1))
    rows = jnp.concatenate([x.reshape(N, -1), jnp.zeros((1, x.shape[-1]), x.dtype)])

    def of_group(group: tuple[jax.Array, jax.Array, jax.Array]) -> Float[Array, "G C"]:
        index, tokens, scales = group
        own = jax.tree.map(lambda leaf: leaf[index], kernels)
        return _of_expert(arch, own, rows[tokens][None], scales[None])[0][0]

    of_groups = jnp.minimum(jnp.searchsorted(last_group, jnp.arange(groups), side="right"), E - 1)
    per_group = (of_groups, token.reshape(groups, _GROUP), scale.reshape(groups, _GROUP))
    found = jax.lax.map(of_group, per_group).reshape(groups * _GROUP, -1)
    return found[place].reshape(B, T, k, -1).sum(axis=2)


def _every_expert(
    arch: Arch, kernels: Tree, x: Float[Array, "B T C"], weights: Float[Array, "B T E"], taps: Collection[str]
) -> tuple[Float[Array, "B T C"], dict[str, Float[Array, "B T E F"]]]:
    """Returns what `_selected_experts` does, and inner activations of all experts, for every token.

    One expert at a time computes all tokens, and those not selected have weight 0: only one expert's activations
    `[B T F]` are held, and tokens stay on their devices.
    """

    def add_expert(
        total: jax.Array, expert: tuple[jax.Array, Tree]
    ) -> tuple[jax.Array, dict[str, Float[Array, "B T F"]]]:
        weight, own = expert
        y, found = _of_expert(arch, own, x, weight)
        return total + y, {tap: found[tap] for tap in taps if tap in found}

    start = jnp.zeros(x.shape, jnp.float32)
    total, found = jax.lax.scan(add_expert, start, (jnp.moveaxis(weights, -1, 0), kernels))
    return total, _experts_last(found)


def _of_expert(
    arch: Arch, own: Tree, x: Float[Array, "B T C"], weight: Float[Array, "B T"]
) -> tuple[Float[Array, "B T C"], dict[str, Float[Array, "B T F"]]]:
    """Returns what one expert adds, in float32, and its inner activations."""
    if arch.router.weights_input:
        x, weight = (x.astype(jnp.float32) * weight[..., None]).astype(x.dtype), jnp.ones_like(weight)
    found = _inner(arch, own, x)
    y = linear(own["down_proj"], found["units"], "btf,fd->btd").astype(jnp.float32)
    return weight[..., None] * y, found


def _to_latent(params: Tree, x: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
    """Returns what experts read: a projection of what their layer reads, or that itself."""
    return linear(params["latent_in"], x, "btd,dc->btc") if "latent_in" in params else x


def _shared(arch: Arch, params: Tree, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns the output of the MLP beside the experts, times its gate if it has one, in float32."""
    units = _inner(arch, params["shared"], x)["units"]
    y = linear(params["shared"]["down_proj"], units, "btf,fd->btd").astype(jnp.float32)
    if not arch.shared_gate:
        return y
    gate = einsum("btd,d->bt", x, params["output_gate"]["kernel"].astype(x.dtype)).astype(jnp.float32)
    return jax.nn.sigmoid(gate)[..., None] * y


def _experts_last(found: dict[str, Float[Array, "E B T F"]]) -> dict[str, Float[Array, "B T E F"]]:
    return {tap: jnp.moveaxis(activations, 0, 2) for tap, activations in found.items()}


def expert_weights(arch: Arch, params: Tree, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
    """Returns every expert's weight in a token, 0 for those not selected, in float32.

    Source: DeepSeek-V3 (arXiv 2412.19437), eq. 12 to 16 for groups and the correction of the selection.
    """
    router, k = arch.router, arch.experts_per_token
    assert k is not None
    logits = linear({name: params[name] for name in ("kernel", "bias") if name in params}, x, "btd,de->bte")
    logits = logits.astype(jnp.float32)
    if router.scores == "sparsemixer":
        return _sparsemixer(logits, k, router.tolerance)
    scores = jax.nn.sigmoid(logits) if router.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    preference = scores + params["correction_bias"].astype(jnp.float32) if router.selects_with_bias else scores
    if router.groups > router.groups_per_token:
        preference = jnp.where(_in_best_groups(arch, preference), preference, -jnp.inf)
    _, selected = jax.lax.top_k(preference, k)
    chosen = jnp.take_along_axis(scores, selected, axis=-1)
    if router.normalized:
        chosen = chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), router.floor)
    weights = _over_experts(chosen * router.scale, selected, logits.shape[-1])
    return weights * params["expert_scale"].astype(jnp.float32) if router.expert_scale else weights


def _over_experts(weights: Float[Array, "B T k"], selected: Int[Array, "B T k"], count: int) -> Float[Array, "B T E"]:
    return (jax.nn.one_hot(selected, count) * weights[..., None]).sum(-2)


def _in_best_groups(arch: Arch, scores: Float[Array, "B T E"]) -> Bool[Array, "B T E"]:
    """Returns which experts are in the groups from which those of a token are selected."""
    router = arch.router
    grouped = scores.reshape(*scores.shape[:-1], router.groups, -1)
    best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]) if router.group_score == "top2" else 1)[0].sum(-1)
    _, selected = jax.lax.top_k(best, router.groups_per_token)
    chosen = jax.nn.one_hot(selected, router.groups).sum(-2) > 0
    return jnp.repeat(chosen, grouped.shape[-1], axis=-1)


def _sparsemixer(scores: Float[Array, "B T E"], k: int, tolerance: float) -> Float[Array, "B T E"]:
    """Returns the weights of Phi-3.5-MoE: experts are taken one after another, each weighted among those close to it.

    Source: Liu et al. 2024, GRIN (arXiv 2409.12136), algorithm 1 without sampling, as transformers has it.
    """
    weights, left = jnp.zeros_like(scores), scores
    for _ in range(k):
        best = left.max(axis=-1, keepdims=True)
        is_close = (best - scores) / jnp.maximum(jnp.abs(scores), best) <= 2 * tolerance
        among = jax.nn.softmax(jnp.where(is_close, left, -jnp.inf), axis=-1)
        chosen = jax.nn.one_hot(left.argmax(axis=-1), scores.shape[-1])
        weights = weights + chosen * among
        left = jnp.where(chosen > 0, -jnp.inf, left)
    return weights
