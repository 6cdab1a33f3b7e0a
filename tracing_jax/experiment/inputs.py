"""Before step 1: checkpoints and text are opened, and all that would stop the run is found; no weight is read."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import jax
import numpy as np

from tracing_jax.alignment import alignment_problems, beyond_permutations
from tracing_jax.arch import Arch, head_problem, length_problem
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import Checkpoint
from tracing_jax.data import SAMPLE
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment.merge_step import MergeInputs, open_merge
from tracing_jax.experiment.models import (
    open_controls,
    open_models,
    open_tokenizers,
    reads_few_weights,
    shared_vocabulary,
    tokenizer_can_be_read,
)
from tracing_jax.experiment.text import RunText, read_learning_text, read_text
from tracing_jax.experiment.validation import (
    RENAMING,
    both_have_forward_pass,
    fitted_to_shapes,
    has_text,
    make_statistics,
    statistic_names,
    text_readers,
    too_costly,
    trains_a_curve,
    with_fitting_blocks,
)
from tracing_jax.options import RunOptions
from tracing_jax.rewrites import Rewrite, arch_after, draw_rewrites
from tracing_jax.statistics import FORWARD, NEEDS, Statistic, Vocabularies, needs_not_applicable


@dataclass(frozen=True)
class RunInputs:
    """A pair that is open but not loaded, with everything that could be checked before loading.

    Attributes:
      base, ft: the two models.
      disguise: rewrites of ft, drawn from the run's seed, applied as its weights are read.
      statistics: by name.
      not_applicable: statistic -> why it cannot be computed on these models.
      not_alignable: why ft cannot be aligned to base; None if it can, or is not to be.
      vocabularies: how the tokens correspond.
      text: None if nothing reads text.
      learning_tokens: the blocks that an alignment or a curve is learnt from; None if none is learnt.
      controls: models that are known to be independent of both.
      needs_resident: whether what is to be undone is found with both models in memory only.
      trains_curve: whether a curve between the models is trained, with both of them in memory.
      reads_few_weights: whether the statistics use a small part of the weights.
      notes: for the record; steps add to them.
      merge: ft with the models that it may be a merge of; None if that was not asked.
    """

    base: Checkpoint
    ft: Checkpoint
    disguise: tuple[Rewrite, ...]
    statistics: dict[str, Statistic]
    not_applicable: dict[str, str]
    not_alignable: str | None
    vocabularies: Vocabularies
    text: RunText | None
    learning_tokens: np.ndarray | None
    controls: tuple[Checkpoint, ...]
    needs_resident: bool
    trains_curve: bool
    reads_few_weights: bool
    notes: list[str]
    merge: MergeInputs | None = None

    def models(self) -> dict[str, Checkpoint]:
        """Returns every model of the run by its part in it: base, ft, control 0, parent 1, origin ..."""
        controls = {f"control {i}": control for i, control in enumerate(self.controls)}
        merge = {} if self.merge is None else {f"parent {i}": m for i, m in enumerate(self.merge.parents.values())}
        if self.merge is not None and self.merge.origin is not None:
            merge["origin"] = self.merge.origin
        more = {name: model for name, model in merge.items() if model is not self.base}
        return {"base": self.base, "ft": self.ft, **controls, **more}


def open_inputs(options: RunOptions) -> RunInputs:
    """Opens both checkpoints and the text, and asks every statistic whether it applies.

    Raises:
      ConfigError: the options do not fit the models.
      CheckpointError, UnsupportedModelError, OSError, ValueError: a model or the text cannot be read.
    """
    base, ft = open_models(options)
    if lines := _weights_only_problems(options, base, ft):
        raise ConfigError("\n  ".join(["the config does not fit the models:", *lines]))
    disguise = _draw_disguise(options, ft)
    options, fitting_notes = with_fitting_blocks(options, base.arch, ft.arch)
    options, unread = _without_unreadable_text(options, base, ft)
    ft_arch = arch_after(disguise, ft.arch)
    statistics = fitted_to_shapes(
        options, make_statistics(options, both_have_forward_pass(base.arch, ft.arch)), base.arch, ft_arch
    )
    needs_text = bool(text_readers(options, statistics)) and not unread
    may_learn = trains_a_curve(options) or (options.align and options.align_evidence == "learned")
    if lines := _option_problems(options, base, ft, needs_text or may_learn):
        raise ConfigError("\n  ".join(["the config does not fit the models:", *lines]))
    tokenizer_base, tokenizer_ft, tokenizer_notes = open_tokenizers(options, base, ft, needs_text or may_learn)
    vocabularies = shared_vocabulary(base, ft, tokenizer_base, tokenizer_ft)
    without_text = {name: unread for name, statistic in statistics.items() if unread and statistic.needs_tokens}
    costly = too_costly(options, statistics, base.arch, ft_arch)
    not_applicable = inapplicable(statistics, base.arch, ft_arch, vocabularies) | costly | without_text
    not_alignable = "; ".join(_alignment_problems(options, base.arch, ft_arch, vocabularies)) if options.align else None
    # Alignment can make models comparable that are not as they are given.
    trains_curve = trains_a_curve(options) and ("mode" not in not_applicable or (options.align and not not_alignable))
    learns = trains_curve or (options.align and options.align_evidence == "learned" and not not_alignable)
    return RunInputs(
        base,
        ft,
        disguise,
        statistics,
        not_applicable,
        not_alignable,
        vocabularies,
        text=read_text(options, tokenizer_base, tokenizer_ft, vocabularies) if needs_text else None,
        learning_tokens=read_learning_text(options, tokenizer_base) if learns else None,
        controls=open_controls(options, base, tokenizer_base),
        needs_resident=options.align and bool(beyond_permutations(options.align_axes)),
        trains_curve=trains_curve,
        reads_few_weights=reads_few_weights(options),
        notes=[
            *(f"{side}: {note}" for side, model in (("base", base), ("ft", ft)) for note in model.notes),
            *(["base and ft are the same files"] if _same_files(base, ft) else []),
            *tokenizer_notes,
            *fitting_notes,
            *_pair_notes(base.arch, ft_arch, vocabularies, "mode" in statistics and "mode" not in not_applicable),
            *_unread_components(options, base, ft),
            *_option_notes(options, base.arch, ft.arch, statistics, not_alignable),
        ],
        merge=open_merge(options, base, ft) if "merge" in options.stat else None,
    )


def inapplicable(
    statistics: Mapping[str, Statistic], base: Arch, ft: Arch, vocabularies: Vocabularies
) -> dict[str, str]:
    """Returns the statistics that do not apply to models of these shapes, each with the reason."""
    problems = {
        name: needs_not_applicable(name, base, ft) or statistic.not_applicable(base, ft, vocabularies)
        for name, statistic in statistics.items()
    }
    return {name: "; ".join(lines) for name, lines in problems.items() if lines}


def _without_unreadable_text(options: RunOptions, base: Checkpoint, ft: Checkpoint) -> tuple[RunOptions, str]:
    """Returns the options without their text if `auto` runs on a model whose tokenizer cannot be read, and the reason.

    The tests that need no text are then the answer, and statistics that need one do not apply, those beside `auto` too.
    An error is raised where `auto` was not asked for, and by an evaluation or an alignment that needs the text.
    """
    if "auto" not in options.stat or not has_text(options) or options.eval or _alignment_reads_text(options):
        return options, ""
    unread = [model.id for model in (base, ft) if not tokenizer_can_be_read(options, model)]
    if not unread:
        return options, ""
    return replace(options, dataset=None, dataset_id=None), f"no tokenizer of {' and '.join(unread)} can be read"


def _alignment_reads_text(options: RunOptions) -> bool:
    return options.align_evidence in ("activations", "learned")


def _same_files(base: Checkpoint, ft: Checkpoint) -> bool:
    return [file.resolve() for file in base.tensors.files()] == [file.resolve() for file in ft.tensors.files()]


def _draw_disguise(options: RunOptions, ft: Checkpoint) -> tuple[Rewrite, ...]:
    if not options.disguise:
        return ()
    key = jax.random.fold_in(jax.random.key(options.seed), zlib.crc32(b"disguise"))
    try:
        return draw_rewrites(options.disguise, key, ft.arch, without=(RENAMING,))
    except ValueError as error:
        shown = ",".join(options.disguise)
        raise ConfigError(f"disguise={shown}, {ft.id}: {error}") from error


def _weights_only_problems(options: RunOptions, base: Checkpoint, ft: Checkpoint) -> list[str]:
    """Returns which options need the forward pass of a model that is read by its weights alone."""
    asked = {"disguise": options.disguise, "permute": options.permute, "align": options.align, "eval": options.eval}
    statistics = statistic_names(options)
    asked |= {f"stat={','.join(statistics)}": all(FORWARD in NEEDS[name] for name in statistics)}
    names = ", ".join(name for name, value in asked.items() if value)
    unread = [checkpoint for checkpoint in (base, ft) if checkpoint.arch.reading is not None]
    return [f"{names}: {checkpoint.id}: {checkpoint.notes[0]}" for checkpoint in unread if names]


def _option_problems(options: RunOptions, base: Checkpoint, ft: Checkpoint, needs_text: bool) -> list[str]:
    """Returns the options that do not fit these models."""
    lines = []
    lengths = {"block_size": options.block_size} if needs_text else {}
    if "csh" in statistic_names(options):
        lengths["csh.block_size"] = options.csh.block_size
    for checkpoint in (base, ft):
        for name, length in lengths.items():
            if problem := length_problem(checkpoint.arch, length):
                lines.append(f"{name}={length}: {checkpoint.id}: {problem}")
        if options.eval and (problem := head_problem(checkpoint.arch)):
            lines.append(f"eval: {checkpoint.id}: {problem}")
    if options.permute:
        try:
            axis_table(ft.arch).axes_of_kind(options.permute_axes)
        except ValueError as error:
            lines.append(f"permute_axes={','.join(options.permute_axes)}: {ft.id}: {error}")
    return lines


def _alignment_problems(options: RunOptions, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
    lines = alignment_problems(base, ft, options.align_axes)
    if vocabularies.known and len(vocabularies.ids_base) == 0:
        lines.append("the vocabularies share no token, so that no row of the embeddings has a counterpart")
    if _alignment_reads_text(options) and not vocabularies.same:
        lines.append(
            f"different tokenizers: align_evidence={options.align_evidence} needs both models to read the same ids; "
            "use weights"
        )
    return lines


def _unread_components(options: RunOptions, base: Checkpoint, ft: Checkpoint) -> list[str]:
    """Returns a note on components of the models that are not compared."""
    sides = [checkpoint.components() for checkpoint in (base, ft)]
    shared = [name for name in sides[0] if name in sides[1] and name != options.component]
    if not shared:
        return []
    sizes = ", ".join(f"{name} ({sides[0][name]:,} and {sides[1][name]:,} weights)" for name in shared)
    return [f"components that were not compared: {sizes}; compare one with component={shared[0]}"]


def _pair_notes(base: Arch, ft: Arch, vocabularies: Vocabularies, on_path: bool) -> list[str]:
    """Returns remarks on these two models for the reader."""
    notes = []
    if not vocabularies.known:
        unknown = "nothing is known of how the two vocabularies correspond"
        by_id = f"; both have {base.vocab_size} tokens, which are taken to be the same, id by id"
        notes.append(unknown + (by_id if vocabularies.same else ""))
    elif not vocabularies.same:
        notes.append(
            f"different tokenizers ({len(vocabularies.ids_base)} tokens shared): each model's perplexity is on its own "
            "tokens of the same text, so compare it per byte; a path runs on base's tokens, embedding and head"
        )
    names = [field.name for field in fields(base) if field.name != "family"]
    different = [name for name in names if getattr(base, name) != getattr(ft, name)]
    if on_path and different:
        notes.append(f"the models differ in {', '.join(different)}: along the path base's are used")
    return notes


def _option_notes(
    options: RunOptions, base: Arch, ft: Arch, statistics: Mapping[str, Statistic], not_alignable: str | None
) -> list[str]:
    """Returns what was asked for and is not done, or only in part."""
    notes = [
        f"{name}: no text is named, so that only the form weights was computed"
        for name in ("match", "match_all")
        if name in statistics and getattr(statistics[name], "forms", ()) != getattr(options, name).forms
    ]
    if options.dataset == SAMPLE and text_readers(options, statistics):
        notes.append(f"text: {SAMPLE}, a short one of this package; name another with dataset for losses that compare")
    if not_alignable:
        notes.append(f"not aligned: {not_alignable}")
    if options.max_layers:
        layers = f"only the first {base.num_layers} layers of base and {ft.num_layers} of ft"
        notes.append(f"max_layers: {layers}; the files, of which a part is read, are not hashed")
    return notes
