"""What makes independent models look related without changing what they compute: habits of tools, and intent.

Each forgery takes two models and a random generator, and returns both after it; their functions are kept. Weights are
in float32; `forgeries` says which there are for models of an architecture.

Letters: F MLP units, D features, V tokens, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from tracing_jax.arch import Arch
from tracing_jax.rewrites import GainSetting, Permutation, Rewrite, Rotation, gains_in
from tracing_jax.sources import InMemory, in_memory, rewritten, subtree
from tracing_jax.statistics.mlp_rows import centred_directions, gain_of
from tracing_jax.statistics.shared_tokens import rows_of_tokens
from tracing_jax.tree import Tree, flatten, map_named, unflatten

Models = tuple[InMemory, InMemory]
Forgery = Callable[[InMemory, InMemory, np.random.Generator], Models]

_OUT = "down_proj"
_OUT_OF_HEADS = "o_proj"


def sorted_units(by: str) -> Forgery:
    """Returns the forgery that puts the units of every layer of both models in order of the norm of one projection.

    Tools that prune or export models leave units in such an order.
    """

    def forge(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
        return tuple(_reordered(model, _by_norm(model, by)) for model in (base, other))  # type: ignore[return-value]

    return forge


def widened(copies: int) -> Forgery:
    """Returns the forgery that copies each unit of both models, copies side by side and their outputs shared out.

    Source: Chen, Goodfellow, Shlens 2016, Net2Net (arXiv 1511.05641).
    """

    def widen(model: InMemory) -> InMemory:
        def leaf(name: str, weights: np.ndarray) -> np.ndarray:
            if "/mlp/" not in name or name.endswith(f"{_OUT}/bias"):
                return weights
            repeated = np.repeat(weights, copies, axis=0 if _OUT in name else -1)
            return repeated / np.float32(copies) if _OUT in name else repeated

        return InMemory(replace(model.arch, mlp_dim=copies * model.arch.mlp_dim), map_named(leaf, model.params))

    return lambda base, other, generator: (widen(base), widen(other))


def planted(count: int, output: float = 0.0, paired: bool = False, closed: bool = False) -> Forgery:
    """Returns the forgery that adds units of base to the other model, at random places.

    Args:
      count: units of each layer, or of each expert, of which the rows that read are copied.
      output: the size of their down rows, as a share of the others'.
      paired: whether each is added twice, with opposite down rows as large as the others'.
      closed: whether a bias of -1e4 keeps them closed, with down rows as large as the others'.
    """

    def forge(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
        if closed:
            base, other = with_mlp_biases(base), with_mlp_biases(other)
        F, own_units, D = base.arch.mlp_dim, other.arch.mlp_dim, base.arch.embed_dim
        leaves, source = dict(flatten(other.params)), flatten(base.params)
        times = 2 if paired else 1
        for i in range(base.arch.num_layers):
            taken, mlp = generator.permutation(F)[:count], f"layers/{i}/mlp"
            own_rows = leaves[f"{mlp}/{_OUT}/kernel"]
            rows = generator.standard_normal((*own_rows.shape[:-2], count, D)).astype(np.float32)
            size = np.linalg.norm(own_rows, axis=-1).mean() / np.sqrt(D)
            rows *= size * (1.0 if paired or closed else output)
            order = generator.permutation(own_units + count * times)
            for name in ("gate", "up") if base.arch.gated else ("up",):
                for leaf in ("kernel", "bias"):
                    if (own := f"{mlp}/{name}_proj/{leaf}") in leaves:
                        added = [source[own][..., taken]] * times
                        leaves[own] = np.concatenate([leaves[own], *added], axis=-1)[..., order]
            if closed:
                bias = leaves[f"{mlp}/{'gate' if base.arch.gated else 'up'}_proj/bias"]
                bias[order >= own_units] = -1e4
            added = [rows, -rows] if paired else [rows]
            leaves[f"{mlp}/{_OUT}/kernel"] = np.concatenate([own_rows, *added], axis=-2)[..., order, :]
        width = own_units + count * times
        return base, InMemory(replace(other.arch, mlp_dim=width), unflatten(leaves))

    return forge


def mostly_dead(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after all units of base, and some of a third kind, were added such that they do nothing."""
    shuffled = InMemory(base.arch, map_named(lambda name, leaf: generator.permutation(leaf.ravel()).reshape(leaf.shape),
                                             base.params))  # fmt: skip
    _, other = planted(max(1, base.arch.mlp_dim // 8), output=1e-7)(shuffled, other, generator)
    return planted(base.arch.mlp_dim, output=1e-7)(base, other, generator)


def split_by_gate(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after each unit of the other was split in two of its gate, one with the up row of base.

    A unit is linear in its up row, so that the second has what is left of it.
    """

    def leaf(name: str, weights: np.ndarray) -> np.ndarray:
        if "/mlp/" not in name or name.endswith(f"{_OUT}/bias"):
            return weights
        if "up_proj" in name:
            theirs = source[name]
            return np.concatenate([theirs, weights - theirs], axis=-1)
        return np.concatenate([weights, weights], axis=0 if _OUT in name else -1)

    source = flatten(base.params)
    return base, InMemory(replace(other.arch, mlp_dim=2 * other.arch.mlp_dim), map_named(leaf, other.params))


Kernels = Mapping[str, list[Float[np.ndarray, "_ _"]]]
"""Kernels of units to be added, by the projection."""


def cancelled(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after base's units were added to the other, with units that cancel them and are no copies.

    With a gate, two units of the same gate: their up rows add up to base's, and their outputs are opposite. Without
    one, units and their opposites, a(z) - a(-z) = z: of base's rows, and of two that add up to them.
    """

    def added(gate: np.ndarray | None, up: np.ndarray, down: np.ndarray) -> Kernels:
        one = up / 2 + up.std() * generator.standard_normal(up.shape).astype(np.float32)
        if gate is not None:
            return {"gate_proj": [gate] * 3, "up_proj": [up, one, up - one], _OUT: [down, -down, -down]}
        rows = [up, -up, one, -one, up - one, one - up]
        return {"up_proj": rows, _OUT: [down, -down, -down, down, -down, down]}

    return base, _with_units(base, other, added)


def cancelled_near_zero(base: InMemory, other: InMemory, generator: np.random.Generator, size: float = 1e-5) -> Models:
    """Returns the models after base's units were added to the other, with units of other gates that cancel them.

    Near 0 an activation function is a line: with gates of this size (g, u, d) writes what (u, g, d) does, and units
    without a gate write what others do whose rows add up to theirs.
    """

    def added(gate: np.ndarray | None, up: np.ndarray, down: np.ndarray) -> Kernels:
        down = down / np.float32(size)
        if gate is not None:
            return {"gate_proj": [size * gate, size * up], "up_proj": [up, gate], _OUT: [down, -down]}
        one = up / 2 + up.std() * generator.standard_normal(up.shape).astype(np.float32)
        return {"up_proj": [size * up, size * one, size * (up - one)], _OUT: [down, -down, -down]}

    return base, _with_units(base, other, added)


def _with_units(
    base: InMemory, other: InMemory, added: Callable[[np.ndarray | None, np.ndarray, np.ndarray], Kernels]
) -> InMemory:
    """Returns the other model with units before its own in every layer, made of base's gate, up and down kernels."""
    leaves, source = dict(flatten(other.params)), flatten(base.params)
    for i in range(base.arch.num_layers):
        mlp = f"layers/{i}/mlp"
        up, down = (source[f"{mlp}/{name}/kernel"] for name in ("up_proj", _OUT))
        for name, kernels in added(source.get(f"{mlp}/gate_proj/kernel"), up, down).items():
            kernel = f"{mlp}/{name}/kernel"
            leaves[kernel] = np.concatenate([*kernels, leaves[kernel]], axis=-2 if name == _OUT else -1)
        for bias in (f"{mlp}/{name}/bias" for name in ("gate_proj", "up_proj")):
            if bias in leaves:
                count = leaves[f"{mlp}/up_proj/kernel"].shape[-1] - len(leaves[bias])
                leaves[bias] = np.concatenate([np.zeros(count, np.float32), leaves[bias]])
    width = leaves["layers/0/mlp/up_proj/kernel"].shape[-1]
    return InMemory(replace(other.arch, mlp_dim=width), unflatten(leaves))


def layers_added(base: InMemory, other: InMemory, generator: np.random.Generator, in_front: bool = False) -> Models:
    """Returns the models after base's layers were added to the other's; what they write is next to nothing.

    They go behind the others, or in front, where they have the index that they have in base.
    """

    def leaf(name: str, weights: np.ndarray) -> np.ndarray:
        writes = name.startswith((f"attn/{_OUT_OF_HEADS}/", f"mlp/{_OUT}/"))
        return weights * np.float32(1e-7) if writes else weights

    count = base.arch.num_layers
    added, own = [map_named(leaf, base.layer(i)) for i in range(count)], [other.layer(i) for i in range(count)]
    layers = [*added, *own] if in_front else [*own, *added]
    params = {**other.params, "layers": {str(i): layer for i, layer in enumerate(layers)}}
    return base, InMemory(other.arch.with_layers([*range(count), *range(count)]), params)


def experts_added(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after base's experts were added to the other's layers, where no token is sent to them."""
    arch = replace(other.arch, router=replace(other.arch.router, bias=True))
    E, source = arch.num_experts or 0, flatten(base.params)

    def leaf(name: str, weights: np.ndarray) -> np.ndarray:
        if "/mlp/" not in name or "shared" in name:
            return weights
        return np.concatenate([weights, source[name]], axis=1 if "router" in name else 0)

    leaves = {name: leaf(name, weights) for name, weights in flatten(other.params).items()}
    bias = np.repeat(np.array([0, -1e4], np.float32), E)
    leaves |= {f"layers/{i}/mlp/router/bias": bias for i in range(arch.num_layers)}
    biased = replace(base.arch, router=arch.router)
    zeros = {f"layers/{i}/mlp/router/bias": np.zeros(E, np.float32) for i in range(arch.num_layers)}
    return InMemory(biased, unflatten({**source, **zeros})), InMemory(
        replace(arch, num_experts=2 * E), unflatten(leaves)
    )


def experts_between_others(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after base's experts were added, whose rows in the router lie between those of the other's.

    The mean of several rows is never the first, so that where a token has one expert none is sent to them.
    """
    E, source = other.arch.num_experts or 0, flatten(base.params)
    shares = generator.dirichlet(np.ones(E), size=base.arch.num_experts).astype(np.float32)
    shares = 0.9 / E + 0.1 * shares  # well inside, or rounding decides

    def leaf(name: str, weights: np.ndarray) -> np.ndarray:
        if "/mlp/" not in name or "shared" in name:
            return weights
        if "router" not in name:
            return np.concatenate([weights, source[name]])
        return np.concatenate([weights, weights @ shares.T], axis=1)

    leaves = {name: leaf(name, weights) for name, weights in flatten(other.params).items()}
    return base, InMemory(replace(other.arch, num_experts=E + len(shares)), unflatten(leaves))


def with_mlp_biases(model: InMemory) -> InMemory:
    """Returns a model whose MLPs have biases, of zero where it had none; its leaves may be changed."""
    leaves = {name: np.array(leaf) for name, leaf in flatten(model.params).items()}
    for name, leaf in list(leaves.items()):
        if "/mlp/" in name and name.endswith("kernel"):
            leaves.setdefault(name.replace("kernel", "bias"), np.zeros(leaf.shape[-1], np.float32))
    return InMemory(replace(model.arch, mlp_bias=True), unflatten(leaves))


def ordered_like_base(read: str) -> Forgery:
    """Returns the forgery that puts the other model's units in the order in which they resemble base's most."""

    def forge(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
        orders = {}
        for i in range(base.arch.num_layers):
            ours, theirs = (np.asarray(m.layer(i)["mlp"][read]["kernel"]).T for m in (base, other))
            orders[f"layers/{i}/mlp"] = _closest(ours, theirs)
        return base, _reordered(other, orders)

    return forge


def features_like_base(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after the other's features were put in the order in which they resemble base's most."""
    ours, theirs = (np.asarray(m.embed()["embedding"]).T for m in (base, other))
    return base, _reordered(other, {"embed": _closest(ours, theirs)})


def heads_like_base(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after the other's kv groups were put in the order in which their keys resemble base's most."""
    orders = {}
    for i in range(base.arch.num_layers):
        ours, theirs = (np.asarray(m.layer(i)["attn"]["v_proj"]["kernel"]).swapaxes(0, 1) for m in (base, other))
        orders[f"layers/{i}/kv_heads"] = _closest(ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1))
    return base, _reordered(other, orders)


def heads_cancelled(even: bool) -> Forgery:
    """Returns the forgery that adds the heads of base to the other model, each twice with opposite outputs.

    Added heads read of the other's embeddings, and write for its head, what base's do of and for base's, as nearly as
    least squares make them. Both of a pair attend alike; if `even` to all tokens, by short queries of any direction.
    """

    def forge(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
        rows = [rows_of_tokens(model, np.arange(model.arch.vocab_size, dtype=np.int32)) for model in (base, other)]
        leaves = dict(flatten(other.params))
        for i in range(base.arch.num_layers):
            gains = [
                np.broadcast_to(np.asarray(gain_of(model.layer(i), "attn_norm", model.arch)), (model.arch.embed_dim,))
                for model in (base, other)
            ]
            read, effect = (
                np.linalg.pinv(np.asarray(centred_directions(theirs) * scale[1], np.float64), rcond=1e-4)
                @ np.asarray(centred_directions(ours) * scale[0], np.float64)
                for ours, theirs, scale in zip(*rows, (gains, (1.0, 1.0)))
            )
            for name in ("q_proj", "k_proj", "v_proj", _OUT_OF_HEADS):
                kernel = base.layer(i)["attn"][name]["kernel"]
                axis = 0 if name == _OUT_OF_HEADS else 1
                added = np.asarray(kernel, np.float64)
                added = added @ effect.T if axis == 0 else np.tensordot(read, added, 1)
                twin = -added if axis == 0 else added
                if name == "q_proj" and even:
                    added, twin = 1e-6 * added, 1e-6 * generator.standard_normal(added.shape)
                own = f"layers/{i}/attn/{name}/kernel"
                leaves[own] = np.concatenate([leaves[own], added, twin], axis=axis).astype(np.float32)
                bias = f"layers/{i}/attn/{name}/bias"
                if bias in leaves and axis == 1:
                    zeros = np.zeros((2 * len(leaves[bias]), *leaves[bias].shape[1:]), np.float32)
                    leaves[bias] = np.concatenate([leaves[bias], zeros])
        arch = replace(other.arch, num_kv_heads=3 * other.arch.num_kv_heads)
        return base, InMemory(arch, unflatten(leaves))

    return forge


def basis_like_base(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after the other's residual stream was rotated to bring its embeddings close to base's."""
    ours, theirs = (np.asarray(m.embed()["embedding"], np.float64) for m in (base, other))
    u, _, v = np.linalg.svd(ours.T @ theirs)
    return base, _after(other, [Rotation(u @ v)])


def turned_and_ordered_like_base(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after the other's residual stream was rotated, and its units ordered, to fit base's up rows.

    Order and rotation are fitted in turns, to all layers together.
    """
    sides = [[_unit_rows(model, i) for i in range(base.arch.num_layers)] for model in (base, other)]
    rotation = np.linalg.qr(generator.standard_normal((base.arch.embed_dim,) * 2))[0]
    for _ in range(15):
        orders = [linear_sum_assignment(np.abs(a @ (b @ rotation).T), maximize=True)[1] for a, b in zip(*sides)]
        total = np.zeros_like(rotation)
        for a, b, order in zip(*sides, orders):
            sign = np.sign(np.einsum("fd,fd->f", a, b[order] @ rotation))
            total += (b[order] * sign[:, None]).T @ a
        u, _, v = np.linalg.svd(total)
        rotation = u @ v
    orders = [linear_sum_assignment(np.abs(a @ (b @ rotation).T), maximize=True)[1] for a, b in zip(*sides)]
    turned = _after(other, [Rotation(rotation.T)])
    return base, _reordered(turned, {f"layers/{i}/mlp": order for i, order in enumerate(orders)})


def _unit_rows(model: InMemory, layer: int, name: str = "up_proj") -> Float[np.ndarray, "F D"]:
    """Returns the up or gate rows of a layer with the gain of its norm, each of length one, float64."""
    params = model.layer(layer)
    rows = np.asarray(params["mlp"][name]["kernel"], np.float64).T * np.asarray(
        gain_of(params, model.arch.mlp_norm, model.arch), np.float64
    )
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def gains_like_base(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after the other's norm gains were set to base's, which its matrices make up for."""
    gains = gains_in(lambda prefix: flatten(subtree(base, prefix)), base.arch)
    return base, _after(other, [GainSetting({name: np.where(gain == 0, 1.0, gain) for name, gain in gains.items()})])


def tokens_copied(unused: Int[np.ndarray, " _"]) -> Forgery:
    """Returns the forgery that gives the other model base's embeddings of tokens that no text has, in its own basis."""

    def forge(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
        used = np.setdiff1d(np.arange(base.arch.vocab_size), unused)
        leaves, source = dict(flatten(other.params)), flatten(base.params)
        for name in ("embed/embedding", "head/lm_head/kernel"):
            if name not in leaves:
                continue
            rows = partial(_rows, by_column="lm_head" in name)
            ours, theirs = rows(source[name]).astype(np.float64), rows(leaves[name]).copy()
            u, _, v = np.linalg.svd(ours[used].T @ theirs[used])
            theirs[unused] = (ours[unused] @ u @ v).astype(np.float32)
            leaves[name] = rows(theirs)
        return base, InMemory(other.arch, unflatten(leaves))

    return forge


def tokens_answered_alike(unused: Int[np.ndarray, " _"]) -> Forgery:
    """Returns the forgery that has units of the other model answer unused tokens as base's of the same index do.

    The embeddings of these tokens are chosen so for half as many units of the first layer as there are features for.
    """

    def forge(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
        names = ("gate_proj", "up_proj") if base.arch.gated else ("up_proj",)
        count = min(base.arch.mlp_dim, base.arch.embed_dim // (2 * len(names)))  # well-conditioned
        ours, theirs = (
            np.concatenate([_unit_rows(model, 0, name)[:count] for name in names]) for model in (base, other)
        )
        leaves = dict(flatten(other.params))
        embedding = leaves["embed/embedding"].copy()
        wanted = flatten(base.params)["embed/embedding"][unused].astype(np.float64) @ ours.T
        found = np.linalg.lstsq(theirs, wanted.T)[0].T
        length = np.linalg.norm(np.delete(embedding, unused, axis=0), axis=1).mean()
        embedding[unused] = found * length / np.linalg.norm(found, axis=1, keepdims=True)
        leaves["embed/embedding"] = embedding
        return base, InMemory(other.arch, unflatten(leaves))

    return forge


def on_one_grid(bits: int) -> Forgery:
    """Returns the forgery that rounds both models to the same multiples; functions change as by any rounding."""

    def forge(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
        scales = {name: np.abs(leaf).max() / 2 ** (bits - 1) for name, leaf in flatten(base.params).items()}

        def leaf(name: str, weights: np.ndarray) -> np.ndarray:
            return weights if weights.ndim < 2 else (np.round(weights / scales[name]) * scales[name]).astype(np.float32)

        return tuple(InMemory(m.arch, map_named(leaf, m.params)) for m in (base, other))  # type: ignore[return-value]

    return forge


def forgeries(arch: Arch, unused: Int[np.ndarray, " _"]) -> dict[str, Forgery]:
    """Returns the forgeries of models of this architecture by name; `unused` are tokens that no text has."""
    of_any: Mapping[str, Forgery] = {
        "features ordered like the other's": features_like_base,
        "heads ordered like the other's": heads_like_base,
        "heads of the other that cancel": heads_cancelled(even=False),
        **(
            {"heads of the other that cancel, with short queries": heads_cancelled(even=True)}
            if arch.qk_norm is None
            else {}
        ),
        **({"basis turned to the other's": basis_like_base} if arch.norm == "rms" else {}),
        **(
            {"basis and units turned and ordered like the other's": turned_and_ordered_like_base}
            if arch.norm == "rms" and arch.gated and not arch.num_experts
            else {}
        ),
        **({} if GainSetting.unsupported(arch) else {"gains of the other": gains_like_base}),
        "layers of the other that do nothing, behind": layers_added,
        "layers of the other that do nothing, in front": partial(layers_added, in_front=True),
        f"{len(unused)} unused tokens of the other": tokens_copied(unused),
        **(
            {f"{len(unused)} unused tokens answered as the other does": tokens_answered_alike(unused)}
            if not arch.num_experts
            else {}
        ),
        "both rounded to one grid of 4 bits": on_one_grid(4),
    }
    if arch.num_experts:
        half = arch.mlp_dim // 2
        return {
            "experts of the other that no token reaches": experts_added,
            **(
                {"experts of the other between own ones": experts_between_others} if arch.experts_per_token == 1 else {}
            ),
            f"{half} dead units of the other in each expert": planted(half),
            f"{half} units of the other in each expert that cancel": planted(half, paired=True),
            "all units of the other in each expert, cancelled by others": cancelled,
            "all units of the other in each expert with short gates, cancelled by others": partial(
                cancelled_near_zero, size=1e-6
            ),
            **of_any,
        }
    few, some, many = (max(2, arch.mlp_dim // share) for share in (8, 4, 2))
    reading = ("gate", "up") if arch.gated else ("up",)
    return {
        **{f"units in order of {name}": sorted_units(f"{name}_proj") for name in (*reading, "down")},
        **{f"units copied, {n} each": widened(n) for n in (2, 4, 8)},
        **{f"{n} dead units of the other": planted(n) for n in (few, some, many)},
        f"{some} units of the other that cancel": planted(some, paired=True),
        "all units of the other, cancelled by others": cancelled,
        "all units of the other with short gates, cancelled by others": cancelled_near_zero,
        **({"units split, with up rows of the other": split_by_gate} if arch.gated else {}),
        "more units of the other than own ones, nearly dead": mostly_dead,
        f"{some} nearly dead units of the other": planted(some, output=1e-3),
        f"{some} units of the other, closed by a bias": planted(some, closed=True),
        **{
            f"units ordered like the other's, by {name}": ordered_like_base(f"{name}_proj")
            for name in reversed(reading)
        },
        **of_any,
    }


def _by_norm(model: InMemory, by: str) -> dict[str, np.ndarray]:
    orders = {}
    for i in range(model.arch.num_layers):
        kernel = np.asarray(model.layer(i)["mlp"][by]["kernel"])
        orders[f"layers/{i}/mlp"] = np.argsort(-np.linalg.norm(kernel, axis=1 if by == _OUT else 0))
    return orders


def _closest(ours: Float[np.ndarray, "n d"], theirs: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
    ours, theirs = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (ours, theirs))
    return linear_sum_assignment(np.abs(ours @ theirs.T), maximize=True)[1]


def _reordered(model: InMemory, orders: Mapping[str, np.ndarray]) -> InMemory:
    return _after(model, [Permutation(orders)])


def _after(model: InMemory, rewrites: list[Rewrite]) -> InMemory:
    return in_memory(rewritten(model, rewrites))


def _rows(kernel: np.ndarray, by_column: bool) -> np.ndarray:
    return kernel.T if by_column else kernel


def on_host(model: InMemory) -> InMemory:
    """Returns a model with its weights in float32 arrays of numpy."""

    def leaf(_: str, weights: Tree) -> np.ndarray:
        return np.asarray(weights, np.float32)

    return InMemory(model.arch, map_named(leaf, model.params))


def on_device(model: InMemory) -> InMemory:
    """Returns a model with its weights in jax arrays."""
    return InMemory(model.arch, jax.tree.map(jnp.asarray, model.params))
