"""From the names of a child and of its possible parents to the report on its shares."""

import os
from collections.abc import Sequence

from tracing_jax.checkpoint import Checkpoint, open_checkpoint
from tracing_jax.experiment.models import resolve_model_id
from tracing_jax.merges import MergeReport, merge_report, opened_models

ModelId = str | os.PathLike[str]


def report_on_merge(
    child: ModelId,
    parents: Sequence[ModelId],
    base: ModelId | None,
    *,
    align: Sequence[str],
    seed: int,
    cache_dir: str | None,
) -> MergeReport:
    """Returns the report; see `tracing_jax.merge_shares`."""

    def opened(model: ModelId) -> Checkpoint:
        return open_checkpoint(resolve_model_id(os.fspath(model)), cache_dir)

    origin = None if base is None else opened(base)
    models = opened_models(opened(child), {os.fspath(parent): opened(parent) for parent in parents}, origin)
    asked = {
        "child": os.fspath(child),
        "parents": [os.fspath(parent) for parent in parents],
        "base": None if base is None else os.fspath(base),
    }
    return merge_report(models, align=tuple(align), seed=seed, asked=asked)
