"""The step of a run that estimates shares: of which models was ft merged, base being one of them or their origin?

What estimates shares is imported where it is used: with it come scipy.stats and more, which other runs do not need.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tracing_jax.checkpoint import Checkpoint
from tracing_jax.data import load_tokenizer
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment.models import open_model, shared_vocabulary
from tracing_jax.options import RunOptions
from tracing_jax.statistics import Vocabularies

_PARTS = {"embedding": "embedding", "attention": "attention", "mlp": "MLPs", "expert": "experts", "router": "router",
          "norm": "norms", "head": "head"}  # fmt: skip
"""Role of a tensor -> part of the model, as verdicts name it."""
_EXCHANGED = ("MLPs", "experts")
"""Parts whose units the test of a parent exchanges; of the others shares are estimated and not tested."""
_ALIGN = ("auto",)
_LEFT_OUT = ("by_tensor", "by_role_and_layer", "left_out")
"""What the record of a run leaves out; `tracing-jax merge` writes it."""


@dataclass(frozen=True)
class MergeInputs:
    """The models that ft may be a merge of, opened.

    Attributes:
      ft: the model that may be a merge.
      parents: name -> model; base is the first unless it is the origin.
      origin: the model that the parents were made from, if it is known.
      asked: the names as they were given, for the record.
    """

    ft: Checkpoint
    parents: Mapping[str, Checkpoint]
    origin: Checkpoint | None
    asked: Mapping[str, Any]


def open_merge(options: RunOptions, base: Checkpoint, ft: Checkpoint) -> MergeInputs:
    """Returns the models of the step, once it is sure that shares can be estimated of them.

    Raises:
      ConfigError: a model is given twice, or nothing can be compared.
      CheckpointError, UnsupportedModelError, OSError, ValueError: a model cannot be read.
    """
    from tracing_jax.merges import MergeError, opened_models, same_files
    from tracing_jax.merges.merge_report import check_models

    name = os.fspath(options.base_model_id or base.id)
    origin = None if options.merge.base is None else open_model(options.merge.base)
    is_base = origin is not None and same_files(origin, base)
    parents = {} if is_base else {name: base}
    parents |= {parent: open_model(parent) for parent in options.merge.parents}
    asked = {"child": options.ft_model_id, "parents": list(parents), "base": options.merge.base}
    try:
        models = opened_models(ft, parents, origin)
        check_models(models)
    except MergeError as error:
        raise ConfigError(f"stat=merge: {error}") from error
    return MergeInputs(ft, parents, origin, asked)


def shares_in_ft(given: MergeInputs, seed: int) -> dict[str, Any]:
    """Returns the report on the shares as plain data, without what it says of every tensor."""
    from tracing_jax.merges import merge_report, opened_models

    models = opened_models(given.ft, dict(given.parents), given.origin)
    tokens = vocabularies_with(given.ft, given.parents)
    record = merge_report(models, align=_ALIGN, seed=seed, asked=given.asked, vocabularies_of=tokens).record
    return {name: value for name, value in record.items() if name not in _LEFT_OUT}


def vocabularies_with(child: Checkpoint, parents: Mapping[str, Checkpoint]) -> Callable[[str], Vocabularies]:
    """Returns a function from the name of a parent to how its tokens and the child's correspond."""

    def of(name: str) -> Vocabularies:
        return shared_vocabulary(parents[name], child, _tokenizer(parents[name]), _tokenizer(child))

    return of


def _tokenizer(model: Checkpoint) -> Any | None:
    try:
        return load_tokenizer(model.tokenizer_folder)
    except (FileNotFoundError, ValueError):
        return None


def with_merge(verdict: dict[str, Any], merge: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the verdict with `merged_of`, and with that in its meaning where it is related and a merge was tested so.

    A merge is claimed of two parents and more that the test by exchanging units says had a part; never of a pair that
    is not called related.
    """
    if merge is None:
        return verdict
    had_part = [part for part in merge["parts"] if part["word"] == "part"]
    if verdict["verdict"] != "related" or len(had_part) < 2:
        return verdict | {"merged_of": None}
    names = [part["name"] for part in had_part]
    found = {
        "sentence": merge["sentence"],
        "parents": {part["name"]: {key: part[key] for key in ("share", "se", "low", "high")} for part in had_part},
        "by_part": {_PARTS[role]: _of_part(shares, names, _PARTS[role]) for role, shares in merge["by_role"].items()},
    }
    return verdict | {"merged_of": found, "meaning": f"{verdict['meaning']}; {merge['sentence']}"}


def _of_part(shares: Mapping[str, Any], names: list[str], part: str) -> dict[str, Any]:
    """Returns the shares of the parents in a part of the model; None for each where they are undefined."""
    keys = ("share", "se", "low", "high")
    return {
        "parents": {name: {key: shares["shares"][name][key] for key in keys} for name in names},
        "tested": part in _EXCHANGED,
        "unexplained": shares["unexplained"],
        "undefined": shares["undefined"],
    }
