"""The engine: token blocks through one model, or along the path between two, layer by layer.

The jitted unit is the block step: one layer, for every alpha at once. It compiles once per shape, whatever the depth:
what differs between layers, such as rope and window, comes in as data. The weights of one interpolated layer live at a
time.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from tracing_jax.arch import Arch, length_problem
from tracing_jax.axes import axis_table
from tracing_jax.interpolate import interpolate, moving_leaves
from tracing_jax.models import apply_block, apply_embed, apply_head, layer_inputs
from tracing_jax.sharding import Compute
from tracing_jax.source import ParamSource, part
from tracing_jax.tree import Tree, flatten, unflatten

_LOGITS_BYTES = 256 * 2**20  # the most that the logits of one head slice may take


def path_losses(
    base: ParamSource,
    ft: ParamSource | None,
    tokens: Int[np.ndarray, "N T"],
    alphas: Sequence[float] | np.ndarray,
    groups: Sequence[str],
    compute: Compute,
    description: str = "losses along the path",
) -> Float[np.ndarray, "A N T1"]:
    """Returns the loss of every predicted token, in nats, at every alpha of the path from base (0) to ft (1).

    The model at alpha has base's facts (rope, norms, scales); only leaves in `groups` move. With no groups `ft` is not
    read. T1 = T - 1: the first token of a block is never predicted. Weights stay on the mesh, and no logits of a whole
    batch are kept.

    Raises:
      ValueError: no tokens, blocks longer than base can read, or ids outside its vocabulary.
    """
    _check_tokens(tokens, base.arch)
    moving = moving_leaves(axis_table(base.arch), groups)
    walk = _Walk(base, ft, moving, jnp.asarray(alphas, jnp.float32), compute.dtype)
    batches = tqdm(compute.batches(tokens), desc=description, unit="batch", disable=None)
    losses = [np.asarray(walk.losses(compute.put(batch))) for batch in batches]
    return np.concatenate(losses, axis=1)[:, : len(tokens)]


def token_losses(
    source: ParamSource, tokens: Int[np.ndarray, "N T"], compute: Compute, description: str = "losses"
) -> Float[np.ndarray, "N T1"]:
    """Returns the loss of every predicted token of one model, in nats."""
    return path_losses(source, None, tokens, (0.0,), (), compute, description)[0]


def logits(
    source: ParamSource, tokens: Int[np.ndarray, "B T"], dtype: DTypeLike = jnp.float32
) -> Float[np.ndarray, "B T V"]:
    """Returns the logits of a few token blocks: for proofs of equal function, not for scoring."""
    _check_tokens(tokens, source.arch)
    still: frozenset[str] = frozenset()
    alphas, embed = jnp.zeros(1), source.embed()
    x = _embed_step(source.arch, dtype, still, embed, {}, alphas, jnp.asarray(tokens))
    for i in range(source.arch.num_layers):  # one layer of a lazy source at a time
        x = _block_step(source.arch, still, source.layer(i), {}, alphas, x, *layer_inputs(source.arch, i))
    return np.asarray(_logits(source.arch, source.head() | {"embed": embed}, x[0]))


class _Walk:
    """The layers of a path in the order in which a batch passes them; parts are read from the sources once."""

    def __init__(
        self, base: ParamSource, ft: ParamSource | None, moving: frozenset[str], alphas: jax.Array, dtype: DTypeLike
    ) -> None:
        self.arch, self.alphas, self.dtype = base.arch, alphas, dtype
        self.embed = _pair("embed/", base, ft, moving)
        self.layers = [_pair(f"layers/{i}/", base, ft, moving) for i in range(base.arch.num_layers)]
        self.head = _pair("head/", base, ft, moving)
        self.inputs = [layer_inputs(base.arch, i) for i in range(base.arch.num_layers)]

    def hidden(self, tokens: jax.Array) -> jax.Array:
        base, ft, moving = self.embed
        x = _embed_step(self.arch, self.dtype, moving, base, ft, self.alphas, tokens)
        for (base, ft, moving), inputs in zip(self.layers, self.inputs, strict=True):
            x = _block_step(self.arch, moving, base, ft, self.alphas, x, *inputs)
        return x

    def losses(self, tokens: jax.Array) -> jax.Array:
        return _loss_step(self.arch, self.head[2] | self._tied, *self._head(), self.alphas, self.hidden(tokens), tokens)

    @property
    def _tied(self) -> frozenset[str]:
        return frozenset(f"embed/{name}" for name in self.embed[2]) if self.arch.tied else frozenset()

    def _head(self) -> tuple[Tree, dict[str, jax.Array]]:
        """Returns base's and ft's head, each with the embedding that a tied head shares."""
        (base, ft, _), (base_embed, ft_embed, _) = self.head, self.embed
        if not self.arch.tied:
            return base, ft
        return base | {"embed": base_embed}, ft | {f"embed/{name}": leaf for name, leaf in ft_embed.items()}


_Pair = tuple[Tree, dict[str, jax.Array], frozenset[str]]
"""A part of base, the leaves of the same part of ft that move, and their names."""


def _pair(prefix: str, base: ParamSource, ft: ParamSource | None, moving: frozenset[str]) -> _Pair:
    """Returns the part under `prefix`; ft's is read only if something in it moves."""
    names = frozenset(name.removeprefix(prefix) for name in moving if name.startswith(prefix))
    leaves = flatten(part(ft, prefix)) if ft is not None and names else {}
    return part(base, prefix), {name: leaves[name] for name in sorted(names)} if leaves else {}, names


@functools.partial(jax.jit, static_argnames=("arch", "dtype", "moving"))
def _embed_step(
    arch: Arch, dtype: DTypeLike, moving: frozenset[str], base: Tree, ft: Tree, alphas: jax.Array, tokens: jax.Array
) -> Float[Array, "A B T D"]:
    def one(alpha: jax.Array) -> jax.Array:
        return apply_embed(arch, interpolate(base, unflatten(ft), alpha, moving), tokens, dtype)

    return jax.lax.map(one, alphas)


@functools.partial(jax.jit, static_argnames=("arch", "moving"), donate_argnames=("x",))
def _block_step(
    arch: Arch,
    moving: frozenset[str],
    base: Tree,
    ft: Tree,
    alphas: Float[Array, " A"],
    x: Float[Array, "A B T D"],
    frequencies: jax.Array,
    window: jax.Array,
    attention_scale: jax.Array,
) -> Float[Array, "A B T D"]:
    def one(alpha_and_x: tuple[jax.Array, jax.Array]) -> jax.Array:
        alpha, x = alpha_and_x
        point = interpolate(base, unflatten(ft), alpha, moving)
        return apply_block(arch, point, x, frequencies, window, attention_scale)

    return jax.lax.map(one, (alphas, x))


@functools.partial(jax.jit, static_argnames=("arch", "moving"))
def _loss_step(
    arch: Arch, moving: frozenset[str], base: Tree, ft: Tree, alphas: jax.Array, x: jax.Array, tokens: jax.Array
) -> Float[Array, "A B T1"]:
    """Returns the losses of a batch; logits exist for a slice of the positions and one alpha at a time."""
    B, T = tokens.shape
    step = _slice_length(T, B * arch.vocab_size * 4)
    targets = jnp.roll(tokens, -1, axis=1).reshape(B, T // step, step)

    def one(alpha_and_x: tuple[jax.Array, jax.Array]) -> jax.Array:
        alpha, x = alpha_and_x
        params = interpolate(base, unflatten(ft), alpha, moving)

        def positions(x_and_targets: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, wanted = x_and_targets
            scores = _logits(arch, params, x)
            picked = jnp.take_along_axis(scores, wanted[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(scores, axis=-1) - picked

        slices = (x.reshape(B, T // step, step, -1).swapaxes(0, 1), targets.swapaxes(0, 1))
        return jax.lax.map(positions, slices).swapaxes(0, 1).reshape(B, T)[:, :-1]

    return jax.lax.map(one, (alphas, x))


def _logits(arch: Arch, params: Tree, x: jax.Array) -> jax.Array:
    own = {name: leaf for name, leaf in params.items() if name != "embed"}
    return apply_head(arch, own, x, params["embed"]["embedding"] if arch.tied else None)


def _slice_length(length: int, bytes_per_position: int) -> int:
    """Returns the largest divisor of the block length whose logits fit the limit."""
    most = max(1, _LOGITS_BYTES // bytes_per_position)
    return max(n for n in range(1, length + 1) if length % n == 0 and n <= most)


def _check_tokens(tokens: np.ndarray, arch: Arch) -> None:
    if tokens.size == 0:
        raise ValueError("no token blocks to score")
    if problem := length_problem(arch, tokens.shape[-1]):
        raise ValueError(problem)
    # An index out of range gives NaN or the last row on a device, never an error.
    if tokens.min() < 0 or tokens.max() >= arch.vocab_size:
        raise ValueError(
            f"token ids run from {tokens.min()} to {tokens.max()}, the vocabulary has {arch.vocab_size}; "
            "tokenizer and model do not belong together"
        )
