"""From the model ids of a run to open checkpoints, and to how their tokens correspond; no weight is read."""

import difflib
from pathlib import Path
from typing import Any

import numpy as np

from tracing_jax import demo
from tracing_jax.checkpoint import Checkpoint, CheckpointError, WeightsOnly, open_checkpoint, tokenizer_folder
from tracing_jax.checkpoint.hub import AS_HUB_ID
from tracing_jax.data import (
    ids_of_text,
    load_tokenizer,
    paired_beginnings,
    same_tokenizer,
    sample_documents,
    shared_tokens,
    unseen_tokens,
)
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.error_messages import shortened
from tracing_jax.experiment.validation import DEMO, statistic_names
from tracing_jax.options import RunOptions
from tracing_jax.statistics import LIGHT, Vocabularies, is_enough

_BLOCKS, _BLOCK_LENGTH = 4, 24
"""Of the text of the package that both models read by themselves; see `token_directions`."""

_SHAPE_OF_CONTROLS = ("num_layers", "embed_dim", "mlp_dim", "vocab_size")


def is_local(model_id: str) -> bool:
    """Returns whether an id is a folder here or a member of the demo family, which no Hub id looks like."""
    on_hub = model_id.partition("@")[0].endswith(".gguf")  # org/name/file.gguf
    several = model_id.count("/") > 1 and not on_hub
    return model_id.startswith((DEMO, "/", ".", "~")) or several or Path(model_id).exists()


def resolve_model_id(model_id: str) -> str:
    """Returns the folder of a member of the demo family, training it if need be; any other id as it is."""
    if not model_id.startswith(DEMO):
        return model_id
    return str(demo.member(model_id.removeprefix(DEMO)))


def reads_few_weights(options: RunOptions) -> bool:
    """Returns whether a small part of the weights is all that is asked for, so that the rest is better left unread."""
    if set(statistic_names(options)) - LIGHT:
        return False
    if "merge" in options.stat:
        return False
    return not (options.align or options.eval or options.disguise or options.permute or options.claim)


def open_models(options: RunOptions) -> tuple[Checkpoint, Checkpoint]:
    """Returns base and the fine-tuned model of a run; their weights are not read yet."""
    base, ft = options.base_model_id or "", options.ft_model_id or ""  # neither is empty in options that were checked
    return (
        _open(options, base, layout=options.base_layout),
        _open(options, ft, options.adapter_base, layout=options.ft_layout),
    )


def open_controls(options: RunOptions, base: Checkpoint, tokenizer_base: Any) -> tuple[Checkpoint, ...]:
    """Opens the models that are known to be independent of both.

    Raises:
      ConfigError: they are not of base's shape, or do not read its tokens; all at once.
    """
    found = tuple(_open(options, model_id) for model_id in options.control_model_ids)
    lines = [
        f"control model {control.id}: {name} {getattr(control.arch, name)}, expected base's {getattr(base.arch, name)}"
        for control in found
        for name in _SHAPE_OF_CONTROLS
        if getattr(control.arch, name) != getattr(base.arch, name)
    ]
    lines += [line for control in found if (line := _tokenizer_problem(options, control, base, tokenizer_base))]
    if lines:
        raise ConfigError("\n  ".join(["the control models do not fit:", *lines]))
    return found


def _tokenizer_problem(
    options: RunOptions, control: Checkpoint, base: Checkpoint, tokenizer_base: Any | None
) -> str | None:
    """Returns that a control model does not read base's tokens; None if it does.

    Where neither has a tokenizer, tokens of vocabularies of one size correspond by their id, as those of a pair do.
    """
    own = _open_tokenizer(options, "control", control, False, [])
    if own is None and tokenizer_base is None and control.arch.vocab_size == base.arch.vocab_size:
        return None
    if own is not None and tokenizer_base is not None and same_tokenizer(tokenizer_base, own):
        return None
    return f"control model {control.id}: another tokenizer than base's, whose tokens it is to read"


def open_tokenizers(
    options: RunOptions, base: Checkpoint, ft: Checkpoint, needed: bool
) -> tuple[Any | None, Any | None, list[str]]:
    """Returns the tokenizers of both models, None for one that cannot be read, and notes on those that cannot.

    Raises:
      FileNotFoundError, ValueError: one cannot be read, and is needed; or the one of `tokenizer_id` cannot.
    """
    notes: list[str] = []
    found = [_open_tokenizer(options, side, model, needed, notes) for side, model in (("base", base), ("ft", ft))]
    return found[0], found[1], notes


def _open_tokenizer(options: RunOptions, side: str, model: Checkpoint, needed: bool, notes: list[str]) -> Any | None:
    """Returns a model's tokenizer, or the one that the options name, or None; the last two add to the notes."""
    try:
        own = load_tokenizer(model.tokenizer_folder)
        if options.tokenizer_id:
            notes.append(f"{side}: its own tokenizer is read, not that of {options.tokenizer_id}")
        return own
    except (FileNotFoundError, ValueError) as error:
        if options.tokenizer_id:
            notes.append(f"{side}: the tokenizer is that of {options.tokenizer_id}; its own cannot be read")
            return load_tokenizer(tokenizer_folder(options.tokenizer_id))
        if needed:
            raise
        notes.append(f"{side} has no tokenizer that can be read: {shortened(error, 400)}")
        return None


def tokenizer_can_be_read(options: RunOptions, model: Checkpoint) -> bool:
    """Returns whether a text can be read as the tokens of a model, by its own tokenizer or the one of the options."""
    try:
        load_tokenizer(model.tokenizer_folder)
    except (FileNotFoundError, ValueError):
        return bool(options.tokenizer_id)
    return True


def shared_vocabulary(base: Checkpoint, ft: Checkpoint, tokenizer_base: Any, tokenizer_ft: Any) -> Vocabularies:
    """Returns how the tokens correspond, among those that both models have an embedding for.

    Vocabularies of one size of which a tokenizer cannot be read are taken to be the same.
    """
    if not (base.arch.vocab_size and ft.arch.vocab_size):
        none = np.zeros(0, np.int32)
        return Vocabularies(False, none, none, known=False)  # what reads no tokens, or whose embedding was not found
    if tokenizer_base is None or tokenizer_ft is None:
        same = base.arch.vocab_size == ft.arch.vocab_size
        ids = np.arange(base.arch.vocab_size if same else 0, dtype=np.int32)
        return Vocabularies(same, ids, ids, known=False)
    ids_base, ids_ft = shared_tokens(tokenizer_base, tokenizer_ft)
    embedded = (ids_base < base.arch.vocab_size) & (ids_ft < ft.arch.vocab_size)
    unseen = unseen_tokens(tokenizer_base, tokenizer_ft, base.arch.vocab_size, ft.arch.vocab_size)
    ids_base, ids_ft, same = ids_base[embedded], ids_ft[embedded], same_tokenizer(tokenizer_base, tokenizer_ft)
    text = sample_documents().text
    text_ids = ids_of_text(tokenizer_base, text), ids_of_text(tokenizer_ft, text)
    in_text = np.isin(ids_base, text_ids[0]) & np.isin(ids_ft, text_ids[1])
    length = min(model.arch.longest or _BLOCK_LENGTH for model in (base, ft))
    length = min(length, _BLOCK_LENGTH)
    blocks = paired_beginnings(text, tokenizer_base, tokenizer_ft, _BLOCKS, length)
    if blocks is not None:
        sides = (blocks.base, base), (blocks.ft, ft)
        if not all(is_enough(ids) and ids.max() < model.arch.vocab_size for ids, model in sides):
            blocks = None
    return Vocabularies(same, ids_base, ids_ft, unseen=unseen, in_text=in_text, text_ids=text_ids, text_blocks=blocks)


def open_model(
    model_id: str,
    download_dir: str | None = None,
    *,
    layout: str | None = None,
    component: str | None = None,
    in_ranges: bool = False,
    adapter_base: str | None = None,
) -> Checkpoint:
    """Returns a model by the id that a user gives; one of an unsupported family is read by its weights alone.

    Args:
      model_id: a folder, a Hub id or a member of the demo family.
      download_dir: where downloads are kept.
      layout: see `WeightsOnly`.
      component: see `WeightsOnly`.
      in_ranges: see `open_checkpoint`.
      adapter_base: see `open_checkpoint`.

    Raises:
      CheckpointError, UnsupportedModelError: it cannot be read; with the folder that may be meant.
    """
    try:
        return open_checkpoint(
            resolve_model_id(model_id), download_dir, in_ranges, adapter_base, WeightsOnly(layout, component)
        )
    except CheckpointError as error:
        if closest := _folder_that_may_be_meant(model_id):
            of_the_hub = [problem for problem in error.problems if "is no folder" not in problem]
            reasons = "; ".join(problem.rpartition(f"{AS_HUB_ID}: ")[2] for problem in of_the_hub)
            as_hub_id = f" {AS_HUB_ID}: {reasons}" if reasons else ""
            raise CheckpointError(f"no folder {model_id!r} here; did you mean {closest}?{as_hub_id}") from error
        raise


def _open(options: RunOptions, model_id: str, adapter_base: str | None = None, layout: str | None = None) -> Checkpoint:
    checkpoint = open_model(
        model_id,
        layout=layout,
        component=options.component,
        in_ranges=reads_few_weights(options),
        adapter_base=adapter_base,
    )
    return checkpoint.first_layers(options.max_layers) if options.max_layers else checkpoint


def _folder_that_may_be_meant(model_id: str) -> str:
    """Returns the folder or file beside a missing one whose name is closest; empty if there is none."""
    path = Path(model_id).expanduser()
    if model_id.startswith(DEMO) or path.exists() or not path.parent.is_dir():
        return ""
    try:
        beside = [other.name for other in path.parent.iterdir() if other.is_dir() or other.suffix == ".gguf"]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, beside, n=1)
    return str(path.parent / close[0]) if close else ""
