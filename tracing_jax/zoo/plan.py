"""The plan of a zoo: its models, its pairs and the config that all pairs share; written into the zoo's folder once."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tracing_jax.options import RunOptions
from tracing_jax.record import atomic_write, plain
from tracing_jax.zoo.models import ModelList

PLAN = "zoo.json"
PAIRS = "pairs"
_FORMAT = 1
_OF_A_PAIR = ("base_model_id", "ft_model_id", "ft_model_ids", "save")


@dataclass(frozen=True)
class PlannedPair:
    """Two models to be traced.

    Attributes:
      name: fit for a file name, and the pair's own in its zoo.
      base, ft: their ids.
      related: whether they are known to have a common ancestor; None if nothing is known.
    """

    name: str
    base: str
    ft: str
    related: bool | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be done in a zoo.

    Attributes:
      names: model id -> the short name that pages and files use; each is one model's own.
      pairs: in the order in which they are traced.
      parents: see `ModelList`.
      config: the fields that the runs of all pairs share.
    """

    names: Mapping[str, str]
    pairs: tuple[PlannedPair, ...]
    parents: Mapping[str, str | None] | None
    config: Mapping[str, Any]

    @cached_property
    def by_name(self) -> Mapping[str, PlannedPair]:
        """The pairs by name."""
        return {pair.name: pair for pair in self.pairs}

    def options_of(self, pair: PlannedPair, folder: Path) -> RunOptions:
        """Returns the options of one pair's run, saved in the zoo's folder."""
        save = str(folder / PAIRS / f"{pair.name}.p")
        return RunOptions.from_config({**self.config, "base_model_id": pair.base, "ft_model_id": pair.ft, "save": save})

    def write(self, folder: Path) -> None:
        """Writes the plan into the folder, whole or not at all."""
        content = {"format": _FORMAT, **plain(asdict(self))}
        atomic_write(folder / PLAN, json.dumps(content, indent=1).encode())


def make_plan(models: ModelList, config: RunOptions | ConfigDict | Mapping[str, Any]) -> Plan:
    """Returns the plan to trace every pair of a list with the same options."""
    names = _short_names(models.models)
    pairs = tuple(
        PlannedPair(f"{names[base]}--{names[ft]}", base, ft, _related(models.parents, base, ft))
        for base, ft in models.pairs
    )
    asked = plain(RunOptions.from_config(config).as_dict())
    shared = {name: value for name, value in asked.items() if name not in _OF_A_PAIR}
    return Plan(names, pairs, models.parents, shared)


def read_plan(folder: Path) -> Plan:
    """Returns the plan that lies in the folder of a zoo.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it was written by another version.
    """
    file = folder / PLAN
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {PLAN} in it; expected the folder of a zoo, which launch.py makes")
    content = json.loads(file.read_bytes())
    if content.pop("format", None) != _FORMAT:
        raise ValueError(f"{file}: written by another version of this program; launch into a new folder")
    pairs = tuple(PlannedPair(**pair) for pair in content.pop("pairs"))
    return Plan(pairs=pairs, **content)


def root_of(parents: Mapping[str, str | None], model: str) -> str:
    """Returns the ancestor of a model that has none itself."""
    while (parent := parents[model]) is not None:
        model = parent
    return model


def _related(parents: Mapping[str, str | None] | None, base: str, ft: str) -> bool | None:
    return None if parents is None else root_of(parents, base) == root_of(parents, ft)


def _short_names(models: Iterable[str]) -> dict[str, str]:
    """Returns for each model the shortest end of its id that no other has, fit for a file name."""
    parts = {model: re.split(r"[/\\]", model.removeprefix("demo:").rstrip("/")) for model in models}
    names: dict[str, str] = {}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        ends = {model: _as_file_name("-".join(parts[model][-depth:])) for model in parts if model not in names}
        count = Counter([*ends.values(), *names.values()])
        names |= {model: end for model, end in ends.items() if count[end] == 1}
    alike = [model for model in parts if model not in names]  # they differ in signs that file names lack
    names |= {model: f"{_as_file_name(parts[model][-1])}-{i}" for i, model in enumerate(alike, 1)}
    return {model: names[model] for model in parts}


def _as_file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"
