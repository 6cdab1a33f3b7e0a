"""Steps 1, 2 and 4 on the models themselves: read or streamed, permuted, disguised, put in base's place."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tracing_jax.alignment import Alignment, AlignmentError, align, aligned
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import Checkpoint, ShardedCheckpoint, load, save_checkpoint
from tracing_jax.experiment.memory import choose_memory
from tracing_jax.experiment.metadata import shape_facts
from tracing_jax.experiment.opening import Opened
from tracing_jax.experiment.validation import DTYPES
from tracing_jax.forward import check_function
from tracing_jax.options import RunOptions
from tracing_jax.rewrites import Permutation, Rewrite, Untying, random_permutations, share_moved
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import (
    InMemory,
    ParamSource,
    PrefetchingSource,
    in_memory,
    is_resident,
    placed,
    rewritten,
    rewritten_donating,
)
from tracing_jax.statistics import Pair


class Layout(NamedTuple):
    """The devices of a run, and whether both models are `resident` there, or `stream` through them layer by layer."""

    mesh: Mesh
    memory: str


def lay_out(options: RunOptions, opened: Opened) -> Layout:
    """Returns how the models of a run will lie, and notes why."""
    mesh = make_mesh(options.mesh.data, options.mesh.model)
    asked = "resident" if options.memory == "auto" and opened.needs_resident else options.memory
    if options.memory == "auto" and opened.is_first_look:
        asked = "stream"
    memory, reason = choose_memory(asked, (opened.base, opened.ft), mesh)
    opened.notes.append(reason)
    return Layout(mesh, memory)


def load_pair(options: RunOptions, opened: Opened, layout: Layout, run_cache: RunCache) -> Pair:
    """Step 1: both models on the mesh, whole or layer by layer; a disguise changes the parts of ft as they are read."""
    mesh, memory = layout
    tokens = None if opened.blocks_base is None else opened.blocks_base.tokens
    return Pair(
        _model(options, opened.base, mesh, memory),
        _model(options, opened.ft, mesh, memory, opened),
        opened.vocabularies,
        tokens,
        Compute(mesh, options.batch_size, DTYPES[options.dtype]),
        options.seed,
        blocks=opened.paired,
        controls=[_model(options, control, mesh, "stream") for control in opened.controls],
        run_cache=run_cache,
    )


def _model(
    options: RunOptions, checkpoint: Checkpoint, mesh: Mesh, memory: str, disguise: Opened | None = None
) -> ParamSource:
    if disguise is None or not disguise.rewrites:
        if memory == "resident":
            return load(checkpoint, mesh, options.cache_dir)
        return PrefetchingSource(ShardedCheckpoint(checkpoint, mesh))
    model = placed(rewritten(checkpoint, disguise.rewrites), mesh)
    return in_memory(model, f"disguising {checkpoint.id}") if memory == "resident" else PrefetchingSource(model)


def prove_disguise(options: RunOptions, opened: Opened, pair: Pair) -> dict[str, Any]:
    """Step 2: what was rewritten, and how far the logits of the model in the files are from those of the disguised."""
    moved = check_function(opened.ft, pair.ft, seed=options.seed)
    names = [rewrite.name for rewrite in opened.rewrites]
    return {"rewrites": names, "seed": options.seed, "logits_moved": moved, "shape": shape_facts(pair.ft.arch)}


def permute_ft(options: RunOptions, pair: Pair) -> tuple[Pair, dict[str, Any]]:
    """Step 2: the fine-tuned model's own weights, its units in a random order."""
    axes = list(options.permute_axes)
    permutations = random_permutations(jax.random.key(options.seed), axis_table(pair.ft.arch), axes)
    facts = {"axes": axes, "seed": options.seed, "share_moved": share_moved(permutations)}
    return replace(pair, ft=_reordered(pair.ft, [Permutation(permutations)])), facts


def _reordered(model: ParamSource, rewrites: Sequence[Rewrite]) -> ParamSource:
    """Returns the model after rewrites that only reorder units; a resident model is donated, not to be used again."""
    return rewritten_donating(model, rewrites, "permuting") if is_resident(model) else rewritten(model, rewrites)


def align_ft(options: RunOptions, opened: Opened, pair: Pair) -> tuple[Pair, Alignment | None]:
    """Step 4: the fine-tuned model in base's place. None, and a note, where its weights turn out not to allow it."""
    shared = None
    # Embeddings padded to different sizes differ in their rows even under one tokenizer.
    if opened.vocabularies.known and not (
        opened.vocabularies.same and pair.base.arch.vocab_size == pair.ft.arch.vocab_size
    ):
        shared = {"vocab": (opened.vocabularies.ids_base, opened.vocabularies.ids_ft)}
    kinds, evidence = options.align_axes, options.align_evidence
    how = {"compute": pair.compute, "shared": shared, "seed": options.seed, "run_cache": pair.run_cache.scope("align")}
    try:
        alignment = _kept_alignment(pair.run_cache) or align(
            pair.base, pair.ft, kinds, evidence=evidence, tokens=pair.tokens, **how
        )
    except AlignmentError as error:
        opened.notes.append(f"not aligned: {error}")
        return pair, None
    _keep_alignment(pair.run_cache, alignment)
    return _in_base_s_place(opened, replace(pair, run_cache=pair.run_cache.scope("aligned")), alignment), alignment


def write_aligned(options: RunOptions, opened: Opened, pair: Pair) -> None:
    """Step 7: the aligned model as a checkpoint. Last: an interrupted run may not find its folder there already."""
    save_checkpoint(options.save_aligned, pair.ft, companions=opened.ft.folder)
    opened.notes.append(f"the aligned model is in {options.save_aligned}")


def _keep_alignment(run_cache: RunCache, alignment: Alignment) -> None:
    """Keeps an alignment by permutations; other maps are found again, with both models in memory."""
    if alignment.reorders_only:
        run_cache.save_arrays(lambda: dict(alignment.permutations), "alignment")
        run_cache.save(asdict(replace(alignment, rewrites=())), "alignment")


def _kept_alignment(run_cache: RunCache) -> Alignment | None:
    fields: dict[str, Any] | None = run_cache.load(dict, "alignment")
    permutations = run_cache.load_arrays("alignment")
    if fields is None or permutations is None:
        return None
    tuples = {"objective": tuple(fields["objective"]), "rewrites": (Permutation(permutations),)}
    return Alignment(**{**fields, **tuples})


def _in_base_s_place(opened: Opened, pair: Pair, alignment: Alignment) -> Pair:
    if alignment.reorders_only:
        return replace(pair, ft=_reordered(pair.ft, alignment.rewrites), aligned=True)
    ft = in_memory(placed(aligned(pair.ft, alignment), pair.compute.mesh), "aligning")
    base = pair.base
    if base.arch.tied and not ft.arch.tied:
        base = _untied(in_memory(base), pair.compute.mesh)  # both models are resident already
        opened.notes.append(
            "aligned, ft has a head of its own; base's was untied from its embedding for that, unchanged"
        )
    return replace(pair, base=base, ft=ft, aligned=True)


def _untied(model: InMemory, mesh: Mesh) -> InMemory:
    """Returns the model with a head of its own, equal to its embedding; the other weights are shared with it."""
    untied = placed(rewritten(model, [Untying()]), mesh)
    return InMemory(untied.arch, {**model.params, "head": jax.tree.map(jnp.asarray, untied.head())})
