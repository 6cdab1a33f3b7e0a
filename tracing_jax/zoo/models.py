"""Lists of models: which pairs of them are to be traced, and what is known of their descent."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FORMS = ("all", "split", "specified", "tree")
"""Ways to make pairs of a list: every two models; bases x fine-tunes; two lists in step; every two, descent known."""

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
      pairs: of ids; the second of each stands in the place of the model that may descend from the first.
      parents: model -> the model that it was made from, None for a root; where descent is not known, None for all.
    """

    models: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    parents: Mapping[str, str | None] | None = None


def read_models(file: str | Path, form: str | None = None) -> ModelList:
    """Returns the models and pairs of a YAML file.

    Args:
      file: a list (`all`), or a mapping with the keys of a form; `tree` maps each model to what was made from it.
      form: of `FORMS`. None: the one that the file's keys say. `all` takes any file, and pairs all its models.

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
    if twice and key not in _KEYS["specified"]:  # there a model may stand in several pairs
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
        raise ValueError(f"tree: {', '.join(twice)} stands in it twice")
    return dict(found)
