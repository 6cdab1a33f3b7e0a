"""Features of the residual stream that are another model's: nobody writes or reads them, or a first layer removes them.

The stream of the other model is widened: behind its own features lie base's, in base's order, with the gains of base's
norms. Where norms subtract the mean over the features, all means are set to zero before, so that features that nothing
writes stay zero.

Letters: D features, F MLP units.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.forgeries import Forgery, Models, with_mlp_biases
from tracing_jax.alignment.rewrite_estimation import means_of
from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.rewrites import MeanSetting, Untying
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.tree import Tree, flatten, map_named, unflatten

_LARGE = 1e3
"""How many times as large as all else a feature is that makes a norm divide every token by the same number."""

_OPEN = 10.0
"""An input at which activation functions are the identity, for inputs up to a few more or less."""

_MEANS = 0.2
"""Standard deviation of means that are several times as large as weights."""


def with_features(base: InMemory, other: InMemory, read: float, embedding: float, more: int = 0) -> InMemory:
    """Returns the other model with base's features behind its own.

    Args:
      base: of the same shape.
      other: the model that gets the features.
      read: how many times as long as in base the rows are that read them.
      embedding: the size of base's embeddings on them; all else writes zeros.
      more: features that are added besides, zeros that nothing reads.
    """
    own, source = _centred(other), flatten(_centred(base).params)
    table, D = axis_table(own.arch), own.arch.embed_dim
    share = D / (2 * D + more)

    def leaf(name: str, x: np.ndarray) -> np.ndarray:
        spec, theirs = table.leaves[name], source[name]
        if "embed" not in spec.axes:
            return x
        dim = spec.axes.index("embed")
        role, size = spec.roles[dim], 0.0
        if role == "reads":
            size = read
        elif name == "embed/embedding":
            size = embedding
        elif name.endswith("/scale"):
            size, x, theirs = 1.0, x * np.float32(np.sqrt(share)), theirs * np.float32(np.sqrt(share))
        zeros = np.zeros([more if i == dim else n for i, n in enumerate(x.shape)], np.float32)
        return np.concatenate([x, np.float32(size) * theirs, zeros], axis=dim)

    arch = replace(own.arch, embed_dim=2 * D + more, norm_eps=own.arch.norm_eps * share)
    return InMemory(arch, map_named(leaf, own.params))


def _centred(model: InMemory) -> InMemory:
    """Returns a model with an untied head and, where its norms subtract the means of what is written, with none."""
    found = in_memory(rewritten(model, [Untying()])) if model.arch.tied else model
    if MeanSetting.unsupported(found.arch):
        return found
    return in_memory(rewritten(found, [MeanSetting.zeros(found.arch)]))


def features_written_by_nobody(read: float) -> Forgery:
    """Returns the forgery by features that are always zero, on which the other's rows are base's times `read`."""
    return lambda base, other, generator: (base, with_features(base, other, read, 0.0))


def features_read_by_nobody(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after base's embeddings were copied to features that nothing reads, small ones."""
    return base, with_features(base, other, 0.0, 1e-3)


def features_removed(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after base's embeddings were copied to features that a new first layer removes.

    All other layers have base's rows on them. Two more features have the same values, opposite and large, at every
    token, so that the norm of the first layer divides all tokens alike; its units are linear there, and biases remove
    those two. Base has a first layer that does nothing.
    """
    base, other = with_mlp_biases(base), with_mlp_biases(other)
    wide, D = with_features(base, other, 1.0, 1.0, more=2), base.arch.embed_dim
    leaves = dict(flatten(wide.params))
    embedding = np.array(leaves["embed/embedding"])
    large = np.float32(_LARGE * np.linalg.norm(embedding, axis=1).max())
    embedding[:, -2:] = [large, -large]
    layers = [_removing(wide, large, np.abs(embedding[:, D : 2 * D]).max())]
    layers += [wide.layer(i) for i in range(wide.arch.num_layers)]
    idle = map_named(lambda name, x: np.zeros_like(x) if _writes(name) else x, base.layer(0))
    return _with_layers(base, [idle, *(base.layer(i) for i in range(base.arch.num_layers))]), _with_layers(
        InMemory(wide.arch, unflatten(leaves | {"embed/embedding": embedding})), layers
    )


def features_removed_of_other_layers(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models of `features_removed`, where each layer has the rows of base's next, the last of its first."""
    layers = [base.layer((i + 1) % base.arch.num_layers) for i in range(base.arch.num_layers)]
    moved = InMemory(base.arch, {**base.params, "layers": {str(i): layer for i, layer in enumerate(layers)}})
    return features_removed(base, other, generator)[0], features_removed(moved, other, generator)[1]


def _removing(wide: InMemory, large: np.float32, largest: np.float32) -> Tree:
    """Returns a layer that subtracts from the stream what base's features and the two others have at each token.

    Unit j reads feature D + j, and the others nothing. With a gate, its own is the same at every token; without one,
    a bias keeps the activation function where it is the identity.
    """
    arch, layer = wide.arch, map_named(lambda name, x: np.zeros_like(x), wide.layer(0))
    D = (arch.embed_dim - 2) // 2
    size, at = np.sqrt(np.float32(2) / arch.embed_dim) * large, np.arange(D)  # of the stream, by which norms divide
    for norm in ("attn_norm", "mlp_norm"):
        layer[norm]["scale"] = np.ones_like(layer[norm]["scale"])
    up, down = (np.array(layer["mlp"][f"{name}_proj"]["kernel"]) for name in ("up", "down"))
    left = np.array(layer["mlp"]["down_proj"]["bias"])
    left[-2:] = [-large, large]
    if arch.gated:
        gate = np.array(layer["mlp"]["gate_proj"]["kernel"])
        gate[-2, at], up[D + at, at] = 1.0, 1.0
        opened = large / size
        down[at, D + at] = -size * (1 + np.exp(-opened)) / opened
        layer["mlp"]["gate_proj"]["kernel"] = gate
    else:
        bias, slope = np.array(layer["mlp"]["up_proj"]["bias"]), 3 * size / largest
        up[D + at, at], down[at, D + at], bias[at] = slope, -size / slope, _OPEN
        left[D + at] = _OPEN * size / slope
        layer["mlp"]["up_proj"]["bias"] = bias
    layer["mlp"]["up_proj"]["kernel"] = up
    layer["mlp"]["down_proj"] = {"kernel": down, "bias": left}
    return layer


def _writes(name: str) -> bool:
    return name.startswith(("attn/o_proj/", "mlp/down_proj/"))


def _with_layers(model: InMemory, layers: Sequence[Tree]) -> InMemory:
    """Returns a model with these layers, of which the first is new."""
    arch = model.arch.with_layers([0, *range(model.arch.num_layers)])
    return InMemory(arch, {**model.params, "layers": {str(i): layer for i, layer in enumerate(layers)}})


def means_like_base(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after the other's means, of what is written and of rows that read, were set to base's."""
    return base, in_memory(rewritten(other, [MeanSetting(means_of(base))]))


def means_alike(base: InMemory, other: InMemory, generator: np.random.Generator) -> Models:
    """Returns the models after the means of both were set to the same, many times as large as their weights."""
    drawn = {name: _MEANS * generator.standard_normal(values.shape) for name, values in means_of(base).items()}
    return tuple(in_memory(rewritten(model, [MeanSetting(drawn)])) for model in (base, other))  # type: ignore[return-value]


def feature_forgeries(arch: Arch) -> dict[str, Forgery]:
    """Returns the forgeries by features, and by means over them, of models of this architecture by name."""
    found: dict[str, Forgery] = {
        "features that nothing writes, read as the other does": features_written_by_nobody(1.0),
        "features that nothing writes, read by rows twice as long": features_written_by_nobody(2.0),
        "features that nothing writes, read by rows 8 times as long": features_written_by_nobody(8.0),
        "embeddings of the other on features that nothing reads": features_read_by_nobody,
    }
    if not arch.num_experts and arch.mlp_dim >= arch.embed_dim:
        found["embeddings of the other on features that a first layer removes"] = features_removed
        found["the same, with the rows of other layers"] = features_removed_of_other_layers
    if not MeanSetting.unsupported(arch):
        found["means of the other, which norms subtract"] = means_like_base
        found["large means alike, which norms subtract"] = means_alike
    return found
