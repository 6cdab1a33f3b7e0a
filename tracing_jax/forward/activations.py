"""Inner activations of one model at selected tokens, layer by layer: one forward pass, however many layers."""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from tracing_jax.forward.forward_pass import forward, forward_mlps
from tracing_jax.progress import tqdm
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource
from tracing_jax.tree import to_host


def activations(
    source: ParamSource,
    tokens: Int[np.ndarray, "N T"],
    at: Int[np.ndarray, "N P"],
    valid: Bool[np.ndarray, "N P"],
    taps: Sequence[str],
    compute: Compute,
    description: str = "activations",
) -> Iterator[tuple[int, dict[str, Float[np.ndarray, "S U"]]]]:
    """Returns an iterator over (layer, {tap: activations in float32 at the S valid positions, in their order}).

    U counts the units of a tap (see `models.tap_axes`): its axes after B and T, flattened. The hidden states of all
    tokens are held, and of each layer only the S rows.
    """
    batches = [compute.put(batch) for batch in compute.batches(tokens)]
    positions = [compute.put(batch) for batch in compute.batches(at)]
    outputs = forward(source, batches, compute.dtype, taps=tuple(taps), at=positions)
    for i in tqdm(range(source.arch.num_layers), desc=description, unit="layer", disable=None):
        found = [compute.get(next(outputs).taps) for _ in batches]
        yield i, {tap: np.concatenate([rows[tap] for rows in found])[: len(at)][valid] for tap in taps}


def embedding_activations(
    source: ParamSource, ids: Int[np.ndarray, " S"], taps: Sequence[str], description: str = "embeddings"
) -> Iterator[tuple[int, dict[str, Float[np.ndarray, "S U"]]]]:
    """Returns an iterator over (layer, {tap: activations}) when each MLP reads the embeddings of these tokens.

    No forward pass: every layer normalises the embeddings and applies its gain, as it would the hidden state.
    """
    outputs = forward_mlps(source, [jnp.asarray(ids)[None]], [tuple(taps)])
    for output in tqdm(outputs, total=source.arch.num_layers, desc=description, unit="layer", disable=None):
        yield output.layer, {tap: units[0] for tap, units in to_host(output.taps).items()}
