"""Lists of models, and the plan of a zoo: its models, its pairs and the config that all pairs share."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from tracing_jax.options import RunOptions
from tracing_jax.record import atomic_write, plain

_KEYS = {
    "all": {"models"},
    "split": {"base_models", "ft_models"},
    "specified": {"models_1", "models_2"},
    "tree": {"tree"},
}
_EXPECTED = (
    "a list of models, or a mapping with `models`, with `base_models` and `ft_models`, with `models_1` and `models_2`, "
    "or with `tree`: names within names"
)


@dataclass(frozen=True)
class ModelList:
    """Models and the pairs of them that are to be traced, in an order in which pairs that share a model are neighbours.

    Attributes:
      models: ids, each once: local folders, Hub ids, `org/name@revision` or `demo:<member>`.
      pairs: of ids; the second of each is the one that may descend from the first.
      parents: model -> the model that it was made from, None for a root; where descent is not known, None for all.
    """

    models: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    parents: Mapping[str, str | None] | None = None


def read_models(file: str | Path, form: str | None = None) -> ModelList:
    """Returns the models and pairs of a YAML file.

    Args:
      file: a list (`all`), or a mapping with the keys of a form; `tree` maps each model to what was made from it.
      form: of `options.PAIRINGS`. None: the one that the file's keys say. `all` takes any file, and pairs all its
        models.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not of that form, names a model twice, or holds no pair.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a YAML file with {_EXPECTED}")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    try:
        found = _model_list(content, form)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not found.pairs:
        raise ValueError(f"{path}: {len(found.models)} models make no pair; name two at least")
    return found


def _model_list(content: Any, form: str | None) -> ModelList:
    fields: dict[str, Any] = content if isinstance(content, dict) else {"models": content}
    forms = [name for name, keys in _KEYS.items() if keys == set(fields)]
    if not forms:
        raise ValueError(f"found {', '.join(map(str, fields)) or 'nothing'}, expected {_EXPECTED}")
    written = forms[0]
    if form not in (None, "all", written):
        raise ValueError(f"--flat={form} asks for {' and '.join(sorted(_KEYS[form or '']))}, found {', '.join(fields)}")
    if written == "tree":
        parents = _unique(list(_descent(fields["tree"], None)))
        return ModelList(tuple(parents), _every_two(parents), parents)
    lists = {key: _ids(key, value) for key, value in fields.items()}
    models = tuple(dict.fromkeys(itertools.chain(*lists.values())))
    if written == "all" or form == "all":
        return ModelList(models, _every_two(models))
    first, second = (lists[key] for key in sorted(lists))  # base before ft, 1 before 2
    if written == "split":
        return ModelList(models, tuple(pair for pair in itertools.product(first, second) if pair[0] != pair[1]))
    if len(first) != len(second):
        raise ValueError(f"models_1 has {len(first)} models and models_2 {len(second)}; they go in step")
    return ModelList(models, tuple(zip(first, second, strict=True)))


def _every_two(models: Mapping[str, Any] | tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(itertools.combinations(models, 2))


def _ids(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(model, str) and model for model in value):
        raise ValueError(f"{key}: expected a list of model ids, found {value!r}")
    twice = sorted({model for model in value if value.count(model) > 1})
    if twice and key not in _KEYS["specified"]:  # there a model may be in several pairs
        raise ValueError(f"{key} names {', '.join(twice)} twice")
    return tuple(value)


def _descent(tree: Any, parent: str | None) -> Iterator[tuple[str, str | None]]:
    """Yields every model with its parent; children are a mapping to their own children, a list, or one name."""
    if isinstance(tree, str):
        tree = [tree]
    if isinstance(tree, list):
        for item in tree:
            yield from _descent(item if isinstance(item, dict) else {item: None}, parent)
    elif isinstance(tree, dict):
        for model, children in tree.items():
            if not isinstance(model, str) or not model:
                raise ValueError(f"tree: expected a model id, found {model!r}")
            yield model, parent
            yield from _descent(children, model)
    elif tree is not None:
        raise ValueError(f"tree: below {parent or 'its root'}: expected names of models, found {tree!r}")


def _unique(found: list[tuple[str, str | None]]) -> dict[str, str | None]:
    models = [model for model, _ in found]
    if twice := sorted({model for model in models if models.count(model) > 1}):
        raise ValueError(f"tree: {', '.join(twice)} is in it twice")
    return dict(found)


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
class Proposal:
    """How the pairs that are compared in full were chosen from those of the list.

    Attributes:
      asked: pairs of the list.
      left_out: those in which signatures show no trace of a relation, and which are not compared.
      not_testable: of these, how many no signature can say anything of.
      known_related: of these, how many the list says are related.
      unsigned: models of which no signature can be made, so that all their pairs are compared -> why.
      closing: pairs that are compared without a trace, since both models have one in a third.
    """

    asked: int
    left_out: int
    not_testable: int
    known_related: int
    unsigned: Mapping[str, str] = field(default_factory=dict)
    closing: int = 0


@dataclass(frozen=True)
class ZooPlan:
    """What is to be done in a zoo.

    Attributes:
      names: model id -> the short name that pages and files use; each is one model's own.
      pairs: in the order in which they are traced.
      parents: see `ModelList`.
      config: the fields that the runs of all pairs share.
      left_out: models of the list that cannot be read -> why.
      proposal: how the pairs were chosen; None: all of the list are compared.
    """

    names: Mapping[str, str]
    pairs: tuple[PlannedPair, ...]
    parents: Mapping[str, str | None] | None
    config: Mapping[str, Any]
    left_out: Mapping[str, str] = field(default_factory=dict)
    proposal: Proposal | None = None

    @cached_property
    def by_name(self) -> Mapping[str, PlannedPair]:
        """The pairs by name."""
        return {pair.name: pair for pair in self.pairs}

    def options_of(self, pair: PlannedPair, folder: Path) -> RunOptions:
        """Returns the options of one pair's run, saved in the zoo's folder."""
        save = str(folder / PAIRS / f"{pair.name}.p")
        return RunOptions.from_config({**self.config, "base_model_id": pair.base, "ft_model_id": pair.ft, "save": save})

    def write(self, folder: Path) -> None:
        """Writes the plan into the folder, atomically."""
        content = {"format": _FORMAT, **plain(asdict(self))}
        atomic_write(folder / PLAN, json.dumps(content, indent=1).encode())


def make_plan(models: ModelList, config: RunOptions | ConfigDict | Mapping[str, Any]) -> ZooPlan:
    """Returns the plan to trace every pair of a list with the same options."""
    names = _short_names(models.models)
    pairs = tuple(
        PlannedPair(f"{names[base]}--{names[ft]}", base, ft, _related(models.parents, base, ft))
        for base, ft in models.pairs
    )
    asked = plain(RunOptions.from_config(config).as_dict())
    shared = {name: value for name, value in asked.items() if name not in _OF_A_PAIR}
    return ZooPlan(names, pairs, models.parents, shared)


def without_models(plan: ZooPlan, left_out: Mapping[str, str]) -> ZooPlan:
    """Returns the plan without these models and their pairs; what was made from one counts as made from its parent.

    Args:
      plan: to trace them too.
      left_out: their ids, each with the reason.

    Raises:
      ValueError: no pair would be left.
    """
    pairs = tuple(pair for pair in plan.pairs if not {pair.base, pair.ft} & left_out.keys())
    if not pairs:
        raise ValueError(f"no pair is left without {', '.join(left_out)}")
    parents = plan.parents
    if parents is not None:
        parents = {model: _nearest(parents, model, left_out) for model in parents if model not in left_out}
    names = {model: name for model, name in plan.names.items() if model not in left_out}
    return replace(plan, names=names, pairs=pairs, parents=parents, left_out=dict(left_out))


def _nearest(parents: Mapping[str, str | None], model: str, left_out: Mapping[str, str]) -> str | None:
    """Returns the nearest ancestor of a model that is not left out."""
    parent = parents[model]
    while parent is not None and parent in left_out:
        parent = parents[parent]
    return parent


def read_plan(folder: Path) -> ZooPlan:
    """Returns the plan in the folder of a zoo.

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
    proposal = content.pop("proposal", None)
    return ZooPlan(pairs=pairs, proposal=proposal and Proposal(**proposal), **content)


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
    same = [model for model in parts if model not in names]  # they differ in characters that file names lack
    names |= {model: f"{_as_file_name(parts[model][-1])}-{i}" for i, model in enumerate(same, 1)}
    return {model: names[model] for model in parts}


def _as_file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"
