"""Step 4: the fine-tuned model aligned to base; and step 7, the aligned model as a checkpoint."""

from dataclasses import asdict, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tracing_jax.alignment import Alignment, AlignmentError, Ends, Evidence, Learning, align, aligned, aligned_base
from tracing_jax.checkpoint import save_checkpoint
from tracing_jax.experiment.inputs import RunInputs
from tracing_jax.experiment.loading import reordered
from tracing_jax.experiment.validation import base_folder
from tracing_jax.options import RunOptions
from tracing_jax.rewrites import Permutation, Untying
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import InMemory, in_memory, rewritten, sharded
from tracing_jax.statistics import Pair


def align_ft(options: RunOptions, inputs: RunInputs, pair: Pair) -> tuple[Pair, Alignment | None]:
    """Step 4: the pair with ft aligned to base. None, and a note, where the weights turn out not to allow it."""
    shared = None
    # Embeddings padded to different sizes differ in their rows even under one tokenizer.
    if inputs.vocabularies.known and not (
        inputs.vocabularies.same and pair.base.arch.vocab_size == pair.ft.arch.vocab_size
    ):
        shared = {"vocab": (inputs.vocabularies.ids_base, inputs.vocabularies.ids_ft)}
    tokens = inputs.learning_tokens if options.align_evidence == "learned" else pair.tokens
    try:
        alignment = _restored_alignment(pair.run_cache) or align(
            pair.base,
            pair.ft,
            options.align_axes,
            evidence=cast(Evidence, options.align_evidence),
            tokens=tokens,
            compute=pair.compute,
            shared=shared,
            seed=options.seed,
            run_cache=pair.run_cache.scope("align"),
            learning=Learning(options.learned.steps, ends=cast(Ends, options.learned.ends)),
        )
    except AlignmentError as error:
        inputs.notes.append(f"not aligned: {error}")
        return pair, None
    _save_alignment(pair.run_cache, alignment)
    return _aligned_pair(inputs, replace(pair, run_cache=pair.run_cache.scope("aligned")), alignment), alignment


def write_aligned(options: RunOptions, inputs: RunInputs, pair: Pair, alignment: Alignment) -> None:
    """Step 7: the aligned model, and base if it was mapped too. Last: a second start finds no folder there."""
    assert options.save_aligned is not None
    save_checkpoint(options.save_aligned, pair.ft, companions=inputs.ft.folder)
    inputs.notes.append(f"the aligned model is in {options.save_aligned}")
    if alignment.base_rewrites:
        folder = base_folder(options.save_aligned)
        save_checkpoint(folder, pair.base, companions=inputs.base.folder)
        inputs.notes.append(f"base was mapped too; it is in {folder}")


def _save_alignment(run_cache: RunCache, alignment: Alignment) -> None:
    """Keeps an alignment by permutations for an interrupted run; other rewrites are found again."""
    if alignment.reorders_only and not alignment.base_rewrites:
        run_cache.save_arrays(lambda: dict(alignment.permutations), "alignment")
        run_cache.save(asdict(replace(alignment, rewrites=())), "alignment")


def _restored_alignment(run_cache: RunCache) -> Alignment | None:
    fields: dict[str, Any] | None = run_cache.load(dict, "alignment")
    permutations = run_cache.load_arrays("alignment")
    if fields is None or permutations is None:
        return None
    tuples = {
        "objective": tuple(fields["objective"]),
        "rewrites": (Permutation(permutations),),
        "base_rewrites": (),  # what reorders only ft maps no base
    }
    return Alignment(**{**fields, **tuples})


def _aligned_pair(inputs: RunInputs, pair: Pair, alignment: Alignment) -> Pair:
    """Returns the pair with ft after the alignment, and base with a head of its own where ft's got one."""
    pair = replace(pair, aligned=True, alignment=alignment.how)
    if alignment.reorders_only:
        return replace(pair, ft=reordered(pair.ft, alignment.rewrites))
    ft = in_memory(sharded(aligned(pair.ft, alignment), pair.compute.mesh), "aligning")
    base = pair.base
    if alignment.base_rewrites:
        base = in_memory(sharded(aligned_base(base, alignment), pair.compute.mesh), "mapping base")
        inputs.notes.append("aligned, base was mapped as well; its function is unchanged")
    if base.arch.tied and not ft.arch.tied:
        base = _untied(in_memory(base), pair.compute.mesh)  # both models are resident already
        inputs.notes.append(
            "aligned, ft has a head of its own; base's was untied from its embedding for that, unchanged"
        )
    return replace(pair, base=base, ft=ft)


def _untied(model: InMemory, mesh: Mesh) -> InMemory:
    """Returns the model with a head of its own, equal to its embedding; the other weights are shared with it."""
    untied = sharded(rewritten(model, [Untying()]), mesh)
    return InMemory(untied.arch, {**model.params, "head": jax.tree.map(jnp.asarray, untied.head())})
