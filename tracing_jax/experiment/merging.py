"""From the names of a child and of its possible parents to the report on its shares."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from tracing_jax.checkpoint import Checkpoint, CheckpointError, WeightsOnly, open_checkpoint
from tracing_jax.error_messages import listed, shortened
from tracing_jax.experiment.merge_step import vocabularies_with
from tracing_jax.experiment.models import open_model, resolve_model_id
from tracing_jax.experiment.signing import suspect_of
from tracing_jax.library import Candidate, library_folder, read_library, scan
from tracing_jax.merges import MergeError, MergeReport, merge_report, not_comparable, opened_models, same_files
from tracing_jax.options import RunOptions

ModelId = str | os.PathLike[str]

MOST_CANDIDATES = 8
"""Of a library so many relatives of the child are read as possible parents, the closest first."""


def report_on_merge(
    child: ModelId,
    parents: Sequence[ModelId],
    base: ModelId | None,
    *,
    library: ModelId | None = None,
    candidates: int = MOST_CANDIDATES,
    align: Sequence[str],
    seed: int,
    download_dir: str | None,
) -> MergeReport:
    """Returns the report; see `tracing_jax.merge_shares`."""

    def opened(model: ModelId) -> Checkpoint:
        return open_checkpoint(resolve_model_id(os.fspath(model)), download_dir, weights_only=WeightsOnly())

    origin = None if base is None else opened(base)
    own = opened(child)
    named = {os.fspath(parent): opened(parent) for parent in parents}
    asked = {
        "child": os.fspath(child),
        "parents": [os.fspath(parent) for parent in parents],
        "base": None if base is None else os.fspath(base),
        "library": None if library is None else os.fspath(library),
    }
    notes: list[str] = []
    if library is not None:
        known = {"the child": own, **({} if origin is None else {"the base": origin}), **named}
        found = proposed_parents(own, os.fspath(library), known, candidates, download_dir)
        named |= found.models
        notes = found.notes
        if not named:
            raise MergeError(
                "\n  ".join([f"no parent is proposed by the library {os.fspath(library)}:", *notes])
                + "\n  name parents with --parents"
            )
    models = opened_models(own, named, origin)
    return merge_report(
        models,
        align=tuple(align),
        seed=seed,
        asked=asked,
        search=library is not None,
        more_notes=notes,
        vocabularies_of=vocabularies_with(own, named),
    )


@dataclass
class Proposed:
    """Models of a library that may be parents.

    Attributes:
      models: name -> open model.
      notes: on what the scan found, and on relatives that are not read.
    """

    models: dict[str, Checkpoint] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def proposed_parents(
    child: Checkpoint, library: str, known: dict[str, Checkpoint], most: int, download_dir: str | None
) -> Proposed:
    """Returns the relatives of a child in a library that can be read beside it, the closest first.

    Args:
      child: the model, which is read once for the scan.
      library: a folder of signatures, or a data set on the Hub.
      known: models that are given already, among them the child; they are not proposed again.
      most: so many at most.
      download_dir: where downloads are kept.

    Raises:
      ValueError: the library cannot be read, or the child has no units to compare.
    """
    signatures = read_library(library_folder(library, download_dir))
    scanned = scan(suspect_of(child, signatures.values()), signatures, RunOptions().level)
    found = Proposed(notes=[f"scan of {len(signatures)} signatures: {scanned.sentence()}"])
    relatives = [c for c in scanned.candidates if c.verdict in ("related", "undecided")]
    depth = next((model.arch.num_layers for name, model in known.items() if name != "the child"), None)
    for at, candidate in enumerate(relatives):
        if len(found.models) == most:
            left = [other.name for other in relatives[at:]]
            found.notes.append(f"relatives beyond the first {most} were not read as candidates: {listed(left)}")
            break
        model, problem = _opened_candidate(candidate, child, [*known.values(), *found.models.values()], download_dir)
        if model is None:
            found.notes.append(f"{candidate.name} is a relative and no candidate: {problem}")
        elif depth is not None and model.arch.num_layers != depth:
            layers = f"{model.arch.num_layers} layers, the other candidates {depth}"
            found.notes.append(f"{candidate.name} is a relative and no candidate: {layers}")
        else:
            depth = model.arch.num_layers
            found.models[_free_name(candidate, found.models)] = model
    return found


def _opened_candidate(
    candidate: Candidate, child: Checkpoint, known: Sequence[Checkpoint], download_dir: str | None
) -> tuple[Checkpoint | None, str]:
    """Returns the model that a signature names, or why it is no candidate."""
    try:
        model = open_model(candidate.model, download_dir)
    except (CheckpointError, OSError, ValueError) as error:
        return None, f"{shortened(candidate.model)} cannot be opened: {shortened(error)}"
    if any(same_files(model, other) for other in known):
        return None, "it is one of the models that were given"
    problem = not_comparable(child, model)
    return (model, "") if problem is None else (None, problem)


def _free_name(candidate: Candidate, taken: dict[str, Checkpoint]) -> str:
    return candidate.model if candidate.model not in taken else f"{candidate.model} ({candidate.name})"
