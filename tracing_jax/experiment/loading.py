"""Steps 1 and 2: both models read or streamed, the fine-tuned one disguised and permuted as was asked."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import Checkpoint, ShardedCheckpoint, load
from tracing_jax.experiment.inputs import RunInputs
from tracing_jax.experiment.memory import Placement
from tracing_jax.experiment.metadata import shape_facts
from tracing_jax.experiment.validation import DTYPES
from tracing_jax.forward import check_function
from tracing_jax.options import RunOptions
from tracing_jax.rewrites import Permutation, Rewrite, random_permutations, share_moved
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute
from tracing_jax.sources import (
    ParamSource,
    PrefetchingSource,
    in_memory,
    is_resident,
    rewritten,
    rewritten_donating,
    sharded,
)
from tracing_jax.statistics import Pair


def load_pair(options: RunOptions, inputs: RunInputs, placement: Placement, run_cache: RunCache) -> Pair:
    """Step 1: both models on the mesh, whole or layer by layer; a disguise changes the parts of ft as they are read."""
    return Pair(
        loaded(options, inputs.base, placement),
        _load_disguised(inputs, placement) if inputs.disguise else loaded(options, inputs.ft, placement),
        inputs.vocabularies,
        None if inputs.text is None else inputs.text.base.tokens,
        Compute(placement.mesh, options.batch_size, DTYPES[options.dtype]),
        options.seed,
        learning_tokens=inputs.learning_tokens,
        learning_steps=options.learned.steps,
        blocks=None if inputs.text is None else inputs.text.paired,
        controls=[loaded(options, control, placement._replace(memory="stream")) for control in inputs.controls],
        run_cache=run_cache,
    )


def loaded(options: RunOptions, checkpoint: Checkpoint, placement: Placement) -> ParamSource:
    """Returns a model on the mesh, whole or read layer by layer."""
    if placement.memory == "resident":
        return load(checkpoint, placement.mesh, options.cache_dir)
    return PrefetchingSource(ShardedCheckpoint(checkpoint, placement.mesh))


def _load_disguised(inputs: RunInputs, placement: Placement) -> ParamSource:
    model = sharded(rewritten(inputs.ft, inputs.disguise), placement.mesh)
    return (
        in_memory(model, f"disguising {inputs.ft.id}") if placement.memory == "resident" else PrefetchingSource(model)
    )


def check_disguise(options: RunOptions, inputs: RunInputs, pair: Pair) -> dict[str, Any]:
    """Step 2: what was rewritten, and how far the logits of the model in the files are from those of the disguised."""
    moved = check_function(inputs.ft, pair.ft, seed=options.seed)
    names = [rewrite.name for rewrite in inputs.disguise]
    return {"rewrites": names, "seed": options.seed, "logits_moved": moved, "shape": shape_facts(pair.ft.arch)}


def permute_ft(options: RunOptions, pair: Pair) -> tuple[Pair, dict[str, Any]]:
    """Step 2: the fine-tuned model's own weights, its units in a random order."""
    axes = list(options.permute_axes)
    permutations = random_permutations(jax.random.key(options.seed), axis_table(pair.ft.arch), axes)
    facts = {"axes": axes, "seed": options.seed, "share_moved": share_moved(permutations)}
    return replace(pair, ft=reordered(pair.ft, [Permutation(permutations)])), facts


def reordered(model: ParamSource, rewrites: Sequence[Rewrite]) -> ParamSource:
    """Returns the model after rewrites that only reorder units; a resident model is donated, not to be used again."""
    return rewritten_donating(model, rewrites, "permuting") if is_resident(model) else rewritten(model, rewrites)
