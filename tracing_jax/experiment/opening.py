"""Before step 1: checkpoints and text are opened, and all that would stop the run is found; no weight is read."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tracing_jax import demo
from tracing_jax.alignment import alignment_problems, beyond_permutations, expected_shape
from tracing_jax.arch import Arch, length_problem
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import Checkpoint, open_checkpoint
from tracing_jax.data import (
    RANDOM,
    Documents,
    PairedBlocks,
    TokenBlocks,
    load_tokenizer,
    paired_on_bytes,
    paired_one_to_one,
    random_token_blocks,
    read_documents,
    same_tokenizer,
    shared_tokens,
    token_blocks,
)
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment.validation import DEMO, RENAMING, make_statistics, statistic_names, text_readers
from tracing_jax.options import RunOptions
from tracing_jax.rewrites import Rewrite, arch_after, draw_rewrites
from tracing_jax.statistics import LIGHT, Statistic, Vocabularies

# No tokenizer averages more over a text; reading stops there, however large the data set is.
_MAX_CHARS_PER_TOKEN = 32


@dataclass(frozen=True)
class Opened:
    """A pair that is open but not loaded, with everything that could be checked before loading."""

    base: Checkpoint
    ft: Checkpoint
    rewrites: tuple[Rewrite, ...]
    """Step 2's disguise of ft, drawn from the run's seed."""
    statistics: dict[str, Statistic]
    not_applicable: dict[str, str]
    not_alignable: str | None
    vocabularies: Vocabularies
    blocks_base: TokenBlocks | None
    blocks_ft: TokenBlocks | None
    paired: PairedBlocks | None
    controls: tuple[Checkpoint, ...]
    needs_resident: bool
    """Whether what is to be undone is found with both models in memory only."""
    is_first_look: bool
    """Whether a small part of the weights is all that is asked for, so that the rest is better left unread."""
    notes: list[str]

    def models(self) -> dict[str, Checkpoint]:
        """Returns every model of the run by the part it plays."""
        controls = {f"control {i}": control for i, control in enumerate(self.controls)}
        return {"base": self.base, "ft": self.ft, **controls}


def open_pair(options: RunOptions) -> Opened:
    """Opens both checkpoints and the text, and asks every statistic whether it applies."""
    base, ft = open_models(options)
    rewrites = _rewrites(options, ft)
    ft_arch = arch_after(rewrites, ft.arch)
    statistics = make_statistics(options)
    needs_tokens = bool(text_readers(options, statistics))
    if lines := _model_problems(options, base, ft, needs_tokens):
        raise ConfigError("\n  ".join(["the config does not fit the models:", *lines]))
    tokenizer_base, tokenizer_ft = (_tokenizer(checkpoint, needs_tokens) for checkpoint in (base, ft))
    vocabularies = _vocabularies(base, ft, tokenizer_base, tokenizer_ft)
    not_applicable = inapplicable(statistics, base.arch, ft_arch, vocabularies)
    not_alignable = "; ".join(_alignment_problems(options, base.arch, ft_arch, vocabularies)) if options.align else None
    if len(not_applicable) == len(statistics):
        hoped = (
            ft_arch if not options.align or not_alignable else expected_shape(base.arch, ft_arch, options.align_axes)
        )
        if len(inapplicable(statistics, base.arch, hoped, vocabularies)) == len(statistics):
            lines = [f"{name}: {problem}" for name, problem in not_applicable.items()]
            raise ConfigError(f"{base.id} and {ft.id} cannot be compared: " + "\n  ".join(lines))
    blocks_base = blocks_ft = paired = None
    if needs_tokens:
        blocks_base, blocks_ft, paired = _blocks(options, tokenizer_base, tokenizer_ft, vocabularies)
    controls = _controls(options, base, tokenizer_base)
    notes = _notes(base.arch, ft_arch, vocabularies, on_path="mode" in statistics and "mode" not in not_applicable)
    if not (options.dataset or options.dataset_id) and {"match", "match_all"} & statistics.keys():
        notes.append("no text is named: match and match_all compare by weights alone")
    if not_alignable:
        notes.append(f"not aligned: {not_alignable}")
    if options.max_layers:
        layers = f"only the first {base.arch.num_layers} layers of base and {ft.arch.num_layers} of ft"
        notes.append(f"max_layers: {layers}; the files, of which a part is read, are not hashed")
    needs_resident = options.align and bool(beyond_permutations(options.align_axes))
    return Opened(
        base, ft, rewrites, statistics, not_applicable, not_alignable, vocabularies, blocks_base, blocks_ft, paired,
        controls, needs_resident, _is_first_look(options), notes,
    )  # fmt: skip


def open_models(options: RunOptions) -> tuple[Checkpoint, Checkpoint]:
    """Returns base and the fine-tuned model of a config; their weights are not read yet."""
    return _opened(options, options.base_model_id), _opened(options, options.ft_model_id)


def _opened(options: RunOptions, model_id: str) -> Checkpoint:
    checkpoint = open_checkpoint(resolved(model_id), in_ranges=_is_first_look(options))
    return checkpoint.first_layers(options.max_layers) if options.max_layers else checkpoint


def _is_first_look(options: RunOptions) -> bool:
    """Returns whether a small part of the weights is all that is asked for, so that the rest is better left unread."""
    return not (
        set(statistic_names(options.stat)) - LIGHT
        or options.align
        or options.eval
        or options.disguise
        or options.permute
    )


def inapplicable(
    statistics: Mapping[str, Statistic], base: Arch, ft: Arch, vocabularies: Vocabularies
) -> dict[str, str]:
    """Returns the statistics that do not apply to models of these shapes, each with the reason."""
    problems = {name: statistic.not_applicable(base, ft, vocabularies) for name, statistic in statistics.items()}
    return {name: "; ".join(lines) for name, lines in problems.items() if lines}


def _rewrites(options: RunOptions, ft: Checkpoint) -> tuple[Rewrite, ...]:
    key = jax.random.fold_in(jax.random.key(options.seed), zlib.crc32(b"disguise"))
    try:
        return draw_rewrites(",".join(options.disguise), key, ft.arch, without=(RENAMING,))
    except ValueError as error:
        raise ConfigError(f"disguise={','.join(options.disguise)}, {ft.id}: {error}") from error


def _model_problems(options: RunOptions, base: Checkpoint, ft: Checkpoint, needs_tokens: bool) -> list[str]:
    """Returns the fields that other models could be run with."""
    lines = []
    for checkpoint in (base, ft) if needs_tokens else ():
        if problem := length_problem(checkpoint.arch, options.block_size):
            lines.append(f"block_size={options.block_size}: {checkpoint.id}: {problem}")
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
    if options.align_evidence == "activations" and not vocabularies.same:
        lines.append("different tokenizers: activations need both models to read the same ids; use weights")
    return lines


def is_local(model_id: str) -> bool:
    """Returns whether a model is in a folder here, or a member of the demo family: no Hub id is spelt so."""
    return model_id.startswith((DEMO, "/", ".", "~")) or model_id.count("/") > 1 or Path(model_id).exists()


def resolved(model_id: str) -> str:
    """Returns the folder of a member of the demo family, training it if need be; any other id as it is."""
    if not model_id.startswith(DEMO):
        return model_id
    return str(demo.member(model_id.removeprefix(DEMO)))


def _tokenizer(checkpoint: Checkpoint, needed: bool) -> Any:
    try:
        return load_tokenizer(checkpoint.tokenizer_folder)
    except FileNotFoundError:
        if needed:
            raise
        return None


def _vocabularies(base: Checkpoint, ft: Checkpoint, tokenizer_base: Any, tokenizer_ft: Any) -> Vocabularies:
    """Returns how the tokens correspond, among those that both models have an embedding for."""
    if tokenizer_base is None or tokenizer_ft is None:
        return Vocabularies(False, np.zeros(0, np.int32), np.zeros(0, np.int32), known=False)
    ids_base, ids_ft = shared_tokens(tokenizer_base, tokenizer_ft)
    known = (ids_base < base.arch.vocab_size) & (ids_ft < ft.arch.vocab_size)
    return Vocabularies(same_tokenizer(tokenizer_base, tokenizer_ft), ids_base[known], ids_ft[known])


def _controls(options: RunOptions, base: Checkpoint, tokenizer_base: Any) -> tuple[Checkpoint, ...]:
    """Opens the models that are known to be independent of both; they must be of base's shape and read its tokens."""
    found = tuple(_opened(options, model_id) for model_id in options.control_model_ids)
    shape = ("num_layers", "embed_dim", "mlp_dim", "vocab_size")
    lines = [
        f"control model {control.id}: {name} {getattr(control.arch, name)}, expected base's {getattr(base.arch, name)}"
        for control in found
        for name in shape
        if getattr(control.arch, name) != getattr(base.arch, name)
    ]
    lines += [
        f"control model {control.id}: another tokenizer than base's, whose tokens it is to read"
        for control in found
        if tokenizer_base is None or not same_tokenizer(tokenizer_base, load_tokenizer(control.tokenizer_folder))
    ]
    if lines:
        raise ConfigError("\n  ".join(["the control models do not fit:", *lines]))
    return found


def _blocks(
    options: RunOptions, tokenizer_base: Any, tokenizer_ft: Any, vocabularies: Vocabularies
) -> tuple[TokenBlocks, TokenBlocks, PairedBlocks]:
    """Returns the text as base's tokens, the very same text as ft's, and both block by block with paired positions."""
    if options.dataset == RANDOM and not options.dataset_id:
        return _random_blocks(options, tokenizer_base, tokenizer_ft, vocabularies)
    documents = _documents(options)
    blocks = token_blocks(documents, tokenizer_base, block_size=options.block_size, num_tokens=options.num_tokens)
    if vocabularies.same:
        return blocks, blocks, paired_one_to_one(blocks.tokens, blocks.tokens)
    theirs = token_blocks(documents.prefix(blocks.text_chars), tokenizer_ft, block_size=options.block_size)
    sizes = {"block_size": options.block_size, "num_tokens": options.num_tokens}
    return blocks, theirs, paired_on_bytes(documents, tokenizer_base, tokenizer_ft, **sizes)


def _random_blocks(
    options: RunOptions, tokenizer_base: Any, tokenizer_ft: Any, vocabularies: Vocabularies
) -> tuple[TokenBlocks, TokenBlocks, PairedBlocks]:
    """Returns tokens drawn uniformly from those that both models have, by string."""
    ids, shape = (
        (vocabularies.ids_base, vocabularies.ids_ft),
        (options.num_tokens // options.block_size, options.block_size),
    )
    if not len(ids[0]):
        raise ConfigError(f"dataset={RANDOM}: the vocabularies share no token; name a text instead")
    drawn = np.random.default_rng([options.seed, zlib.crc32(RANDOM.encode())]).integers(len(ids[0]), size=shape)
    base, ft = (
        random_token_blocks(of_model, drawn, tokenizer, options.seed)
        for of_model, tokenizer in zip(ids, (tokenizer_base, tokenizer_ft))
    )
    return base, ft, paired_one_to_one(base.tokens, ft.tokens, "random tokens of both vocabularies, paired by string")


def _documents(options: RunOptions) -> Documents:
    if options.dataset == "demo" and not options.dataset_id:
        return read_documents(str(demo.held_out_text()))
    return read_documents(
        options.dataset_id or options.dataset,
        subset=options.dataset_subset,
        split=options.dataset_split,
        text_column=options.text_column,
        max_chars=_MAX_CHARS_PER_TOKEN * options.num_tokens,
        data_dir=options.data_dir,
    )


def _notes(base: Arch, ft: Arch, vocabularies: Vocabularies, on_path: bool) -> list[str]:
    notes = []
    if not vocabularies.known:
        notes.append("a model has no tokenizer files: nothing is known of how the two vocabularies correspond")
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
