"""`open_checkpoint`: a local folder or a Hub id becomes a `Checkpoint`; no weight is read."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from tracing_jax.arch import (
    OTHERS,
    WEIGHTS_ONLY,
    Arch,
    UnsupportedModelError,
    negative_epsilon,
    read_arch_and_notes,
    read_raw_config,
)
from tracing_jax.checkpoint.adapter import base_id, is_adapter, merged, merged_by_weights
from tracing_jax.checkpoint.checkpoint import Checkpoint
from tracing_jax.checkpoint.derived_tensors import RenamedTensors
from tracing_jax.checkpoint.errors import CheckpointError, MisfitError
from tracing_jax.checkpoint.fitting import fitted, tied_as_stored, tied_names, with_plain_names, without_float64
from tracing_jax.checkpoint.foreign_files import original_format
from tracing_jax.checkpoint.gguf import GgufModel
from tracing_jax.checkpoint.hub import CheckpointFolder, on_hub, resolve
from tracing_jax.checkpoint.name_patterns import plain_names
from tracing_jax.checkpoint.quantised import IGNORED, dequantised
from tracing_jax.checkpoint.tensors import TensorStore, names_in_index, open_tensors
from tracing_jax.checkpoint.weights_only import Description, build, describe, with_layout
from tracing_jax.error_messages import listed, shortened

_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
_MOST_ADAPTERS = 8
"""On top of each other; more is taken for a mistake."""


class _Files(NamedTuple):
    """The files of a model, or of its base if it is an adapter."""

    folder: Path
    tokenizer_folder: Path
    arch: Arch
    tensors: TensorStore
    notes: tuple[str, ...]


class WeightsOnly(NamedTuple):
    """How a model is opened of which only the weights are understood.

    Attributes:
      layout: a file that says where parts are stored, see `docs/checkpoints.md`; the model is then read by its weights
        alone, whatever its family.
      component: `vision`, `audio` or `encoder`: that part of the model alone, by its weights.
    """

    layout: str | None = None
    component: str | None = None

    @property
    def is_forced(self) -> bool:
        """Whether a model is read by its weights alone though its family is supported."""
        return self.layout is not None or self.component is not None


def open_checkpoint(
    model_id: str,
    download_dir: str | None = None,
    in_ranges: bool = False,
    adapter_base: str | None = None,
    weights_only: WeightsOnly | None = None,
) -> Checkpoint:
    """Returns the checkpoint of a local folder or Hub id (`org/name` or `org/name@revision`), to be read part by part.

    A LoRA adapter is merged into its base as that is read. The base is the local folder or Hub repository that the
    adapter's config names, which is logged. Of the weights only a head is read that is stored beside the embedding of a
    tied model, to see whether it is the same.

    Args:
      model_id: of the model.
      download_dir: where downloads are kept, see `resolve`.
      in_ranges: whether weights that are on the Hub, and not in its cache, stay there, and are read in ranges of bytes:
        for runs that use a small part of them.
      adapter_base: the base to merge an adapter into, whatever its config names; of no effect on other models.
      weights_only: how a model is read whose config is refused or absent, or whose tensors are not those that it asks
        for, though none is lost; by default it is refused. Weights are then read where names and shapes leave a
        doubt.

    Raises:
      CheckpointError: not found, not readable, or tensors missing, unexpected or of the wrong shape, all at once.
      UnsupportedModelError: the config asks for something this package does not compute.
    """
    found = resolve(model_id, download_dir, weights=not in_ranges, config=weights_only is None)
    with contextlib.suppress(UnsupportedModelError):  # configs that cannot be read are reported where they are needed
        _check_epsilon(found, read_raw_config(found.folder))
    if weights_only is not None and weights_only.is_forced:
        return _open_weights(found, download_dir, in_ranges, weights_only, adapter_base=adapter_base)
    try:
        return _open_supported(found, download_dir, in_ranges, adapter_base)
    except UnsupportedModelError as error:
        if weights_only is None:
            raise
        return _open_weights(found, download_dir, in_ranges, weights_only, _cause(error), adapter_base)
    except MisfitError as error:
        if weights_only is not None and error.is_whole:
            return _open_weights(found, download_dir, in_ranges, weights_only, "; ".join(error.problems), adapter_base)
        problems = error.problems if weights_only is None else _with_remedy(error.problems, model_id)
        raise CheckpointError(*(f"{model_id}: {problem}" for problem in problems)) from error


def _cause(error: UnsupportedModelError) -> str:
    """Returns why a config is not supported, without the list of families that are."""
    return str(error).partition(OTHERS)[0]


def _with_remedy(problems: Sequence[str], model_id: str) -> Sequence[str]:
    remedy = (
        f"download the files again; if they are complete, `tracing-jax inspect {shortened(model_id)}` shows what they "
        "hold, to be read by its weights alone (--base_layout, --ft_layout)"
    )
    return (*problems, remedy) if len(problems) > 1 else (f"{problems[0]}; {remedy}",)


def _open_supported(
    found: CheckpointFolder, download_dir: str | None, in_ranges: bool, adapter_base: str | None
) -> Checkpoint:
    """Opens a model of a supported family."""
    files = _open_files(found, download_dir, in_ranges, adapter_base, ())
    try:
        model = fitted(files.arch, files.tensors, compare_rows=not in_ranges)
        if not model.arch.has_head and (lost := [name for name in names_in_index(files.folder) if _is_head(name)]):
            raise CheckpointError(f"the index names {lost[0]}, which no file has; download the weights again")
    except MisfitError as error:
        kind = next((kind for file in files.tensors.files() if (kind := original_format(file))), None)
        if kind and not error.is_whole:
            raise CheckpointError(f"{found.id}: {kind}") from error
        # A format whose tensors are not recognised is why they do not fit.
        ignored = [note for note in files.notes if note.startswith(IGNORED)]
        raise MisfitError(*([kind] if kind else [*ignored, *error.problems]), is_whole=error.is_whole) from error
    except CheckpointError as error:
        raise CheckpointError(*(f"{found.id}: {problem}" for problem in error.problems)) from error
    notes = (*files.notes, *model.notes)
    for note in notes:
        logging.info("%s: %s", found.id, note)
    return Checkpoint(
        found.id, found.revision, files.folder, files.tokenizer_folder, model.arch, model.tensors, notes=notes
    )


def _is_head(name: str) -> bool:
    return f".{name}".endswith(".lm_head.weight")


def inspect_checkpoint(
    model_id: str, component: str | None = None, layout: str | None = None, download_dir: str | None = None
) -> Description:
    """Returns what is found of a model by the names, shapes and numbers of its tensors, whatever its family.

    Args:
      model_id: as that of `open_checkpoint`; no adapter.
      component: a component such as `vision`, in place of the language model.
      layout: a file that says otherwise.
      download_dir: where downloads are kept.

    Raises:
      CheckpointError: not found, not readable, or not understood.
    """
    found = resolve(model_id, download_dir, config=False)
    return _described(found, *_plain_tensors(found, download_dir, False)[1:3], WeightsOnly(layout, component))


def _described(
    found: CheckpointFolder, config: dict[str, Any], store: TensorStore, options: WeightsOnly
) -> Description:
    try:
        description = describe(store, config, options.component)
        if options.layout is not None:
            description = with_layout(description, Path(options.layout).expanduser())
    except CheckpointError as error:
        raise CheckpointError(*(f"{found.id}: {problem}" for problem in error.problems)) from error
    return description


def _open_weights(
    found: CheckpointFolder,
    download_dir: str | None,
    in_ranges: bool,
    options: WeightsOnly,
    refused: str | None = None,
    adapter_base: str | None = None,
) -> Checkpoint:
    """Opens a model by the names and shapes of its tensors, and by their numbers where these leave a doubt.

    Args:
      found: the folder.
      download_dir: see `open_checkpoint`.
      in_ranges: see `open_checkpoint`.
      options: a layout or a component, if given.
      refused: why it is not read as a model of its family.
      adapter_base: see `open_checkpoint`.
    """
    folder, config, store, notes = _plain_tensors(found, download_dir, in_ranges, adapter_base)
    try:
        description = _described(found, config, store, options)
        built = build(description, store, str(config.get("model_type") or "unknown"))
    except CheckpointError as error:
        cause = [f"{found.id}: {shortened(refused, 400)}"] if refused else []
        raise CheckpointError(*cause, *error.problems) from error
    why = f": {shortened(refused, 400)}" if refused else ""
    what = f"of its component {options.component} " if options.component else ""
    notes = [f"{WEIGHTS_ONLY}{why}", *notes, *(f"{what}read: {line}" for line in description.lines())]
    for note in notes:
        logging.info("%s: %s", found.id, note)
    return Checkpoint(found.id, found.revision, folder, folder, built.arch, built.tensors, tuple(notes), built.layouts)


def _plain_tensors(
    found: CheckpointFolder,
    download_dir: str | None,
    in_ranges: bool,
    adapter_base: str | None = None,
    above: tuple[Path, ...] = (),
) -> tuple[Path, dict[str, Any], TensorStore, list[str]]:
    """Returns the folder of config and tokenizer, the config as plain data, and the tensors under plain names."""
    if is_adapter(found.folder):
        chain = (*above, found.folder.resolve())
        base = _base_below(found, download_dir, adapter_base, chain)
        folder, config, below, notes = _plain_tensors(base, download_dir, False, above=chain)
        return folder, config, merged_by_weights(below, found.folder, config), notes
    if found.gguf:
        model = GgufModel(found.gguf)
        folder, notes = model.description(of_any_family=True)
        config = read_raw_config(folder)
        _check_epsilon(found, config)
        return folder, config, model.stored, notes
    config, unread = _config_as_data(found.folder)
    _check_epsilon(found, config)
    stored = open_tensors(found.folder, on_hub(found, download_dir)) if in_ranges else open_tensors(found.folder)
    try:
        store: TensorStore = RenamedTensors(stored, plain_names(stored.names(), ()))
        store, formats = dequantised(store, config)
        store, rounding = without_float64(store)
    except CheckpointError as error:
        raise CheckpointError(*(f"{found.id}: {problem}" for problem in error.problems)) from error
    return found.folder, config, store, [*unread, *formats, *rounding]


def _check_epsilon(found: CheckpointFolder, config: Mapping[str, Any]) -> None:
    """Refuses norms with a negative epsilon, in what a model says of itself or the base of an adapter of itself."""
    if problem := negative_epsilon(config):
        raise CheckpointError(f"{found.id}: config: {problem}")


def _config_as_data(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns the config of a model that is read by its weights alone, and a note if it has none.

    Raises:
      UnsupportedModelError: there is one that cannot be read: what is damaged may lack tensors as well.
    """
    if not (folder / "config.json").exists():
        return {}, ["there is no config.json, so that nothing is known but the tensors"]
    return read_raw_config(folder), []


def _open_files(
    found: CheckpointFolder,
    download_dir: str | None,
    in_ranges: bool,
    adapter_base: str | None,
    above: tuple[Path, ...],
) -> _Files:
    """Returns the tensors of a folder under plain names; those of an adapter merged into its base's.

    Args:
      found: the folder.
      download_dir: see `open_checkpoint`.
      in_ranges: see `open_checkpoint`.
      adapter_base: see `open_checkpoint`.
      above: the folders of the adapters whose base this is.
    """
    if is_adapter(found.folder):
        return _open_adapter(found, download_dir, adapter_base, (*above, found.folder.resolve()))
    if found.gguf:
        return _open_gguf(found.gguf)
    arch, notes = read_arch_and_notes(found.folder)
    stored = open_tensors(found.folder, on_hub(found, download_dir)) if in_ranges else open_tensors(found.folder)
    try:
        tensors, renaming = with_plain_names(arch, stored)
        tensors, formats = dequantised(tensors, read_raw_config(found.folder))
    except CheckpointError as error:
        raise CheckpointError(*(f"{found.id}: {problem}" for problem in error.problems)) from error
    return _Files(found.folder, found.folder, arch, tensors, (*notes, *renaming, *formats))


def _open_gguf(paths: tuple[Path, ...]) -> _Files:
    model = GgufModel(paths)
    folder, notes = model.description()
    arch, more = read_arch_and_notes(folder)
    return _Files(folder, folder, arch, model.tensors(arch), (*notes, *more))


def _open_adapter(
    found: CheckpointFolder, download_dir: str | None, adapter_base: str | None, chain: tuple[Path, ...]
) -> _Files:
    base = _base_below(found, download_dir, adapter_base, chain)
    files = _open_files(base, download_dir, False, None, chain)
    # What the base ties decides what the adapter changes, so the base is settled before anything is merged into it.
    arch, tensors, notes = tied_as_stored(files.arch, files.tensors)
    ends = tied_names(files.arch, tensors.names())
    changed = merged(tensors, found.folder, ends, tied=files.arch.tied, shared=arch.tied)
    rows = changed.shape(ends[0])[0] if ends[0] in changed.names() else files.arch.vocab_size
    if rows > (before := tensors.shape(ends[0])[0] if ends[0] in tensors.names() else rows):
        files = files._replace(arch=replace(files.arch, vocab_size=rows))
        notes = [*notes, f"the adapter has {rows} tokens, the base {before}: embedding and head are the adapter's"]
    tokenizer = found.folder if any((found.folder / name).exists() for name in _TOKENIZERS) else files.tokenizer_folder
    return files._replace(
        tensors=changed, tokenizer_folder=tokenizer, notes=tuple(dict.fromkeys((*files.notes, *notes)))
    )


def _base_below(
    found: CheckpointFolder, download_dir: str | None, adapter_base: str | None, chain: tuple[Path, ...]
) -> CheckpointFolder:
    """Returns the folder of an adapter's base, which is none of the adapters above it."""
    base = _resolve_base(found, download_dir, adapter_base)
    if base.folder.resolve() in chain or len(chain) > _MOST_ADAPTERS:
        raise CheckpointError(f"{found.id}: its base is an adapter that has it as its base: {listed(chain)}")
    return base


def _resolve_base(adapter: CheckpointFolder, download_dir: str | None, given: str | None) -> CheckpointFolder:
    """Returns the folder of an adapter's base, and logs which model that is and where it is read from."""
    model_id, source = (given, "as given") if given else (base_id(adapter.folder), "named by its adapter_config.json")
    try:
        base = resolve(model_id, download_dir)
    except CheckpointError as error:
        reasons = (f"{adapter.id}: its base model {model_id}, {source}: {problem}" for problem in error.problems)
        raise CheckpointError(*reasons) from error
    where = f"commit {base.revision} of the Hub" if base.revision else f"folder {base.folder.resolve()}"
    logging.info("%s: a LoRA adapter, merged into %s (%s), read from %s", adapter.id, model_id, source, where)
    return base
