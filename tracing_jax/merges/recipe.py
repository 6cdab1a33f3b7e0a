"""A configuration for mergekit that would make the child again.

Source: the configuration format of arcee-ai/mergekit; parameters by filter and by layer are its own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from tracing_jax.merges.choice import Choice, name_of_unit
from tracing_jax.merges.models import MergeModels
from tracing_jax.merges.shares import Shares

MOST_LEFT = 0.5
"""A recipe that leaves more of the child's difference, in squares, than this is none; DARE excepted, which draws."""
FILTERS = {"norm": "norm", "attention": "self_attn", "mlp": "mlp", "expert": "experts", "router": "gate",
            "embedding": "embed_tokens", "head": "lm_head"}  # fmt: skip
"""Role -> part of the names of its tensors in checkpoints like Llama's; the first that fits a name counts."""
_SAME = 2e-3  # numbers that differ by less are written as one
_DIGITS = 4
_OWNED = 0.05  # shares that are so near to those of one model are those of that model

RoleShares = Mapping[tuple[str, int | None], Shares]


def recipe(
    models: MergeModels, choice: Choice, by_place: RoleShares, origin_name: str | None, dtype: str
) -> str | None:
    """Returns the YAML; None where no method explains the child.

    Args:
      models: those that were compared.
      choice: the method.
      by_place: shares by role and layer, for a method by which they differ.
      origin_name: of the origin, as the user gave it.
      dtype: of the child.
    """
    method = choice.method
    if method is None or choice.residual is None:
        return None
    if choice.residual > MOST_LEFT and not method.name.startswith("dare"):
        return None
    named = [name_of_unit(models, unit) for unit in range(models.terms + 1)]
    names = [origin_name if name is None else name for name in named]
    given: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {"merge_method": method.name}
    parameters = method.parameters
    if models.layers is not None and method.name not in ("copy", "stitched"):
        return None  # slices of several models with weights of their own: no recipe is written for these
    if method.name == "copy" and models.layers is not None:
        owner = names[parameters["of"]]
        return _stitched({f"layers/{i}": owner for i in range(len(models.layers[0]))}, models, dtype)
    if method.name == "copy":
        top = {"merge_method": "linear"}
        given = {str(names[parameters["of"]]): {"weight": 1.0}}
    elif method.name == "stitched":
        owners = _of_whole_layers({place: names[of] for place, of in parameters["of"].items()})
        return None if owners is None else _stitched(owners, models, dtype)
    elif method.name.startswith("linear"):
        top = {"merge_method": "linear"} if origin_name is None else {"merge_method": "task_arithmetic"}
        given = {name: {"weight": weight} for name, weight in zip(models.names, _weights(models, choice, by_place))}
    elif method.name == "slerp":
        one, other = (names[i] for i in parameters["between"])
        values: dict[tuple[str, int | None], list[float]] = {}
        for place, t in parameters["t"].items():
            values.setdefault(_key(models, place), []).append(t)
        t = _by_role({key: float(np.mean(own)) for key, own in values.items() if own}, models.child.arch.num_layers)
        top = {"merge_method": "slerp", "base_model": one, "parameters": {"t": t}}
        given = {str(one): {}, str(other): {}}
    else:
        given = {
            name: {"weight": _rounded(w), "density": _rounded(d)}
            for name, w, d, follows in zip(
                models.names, parameters["weight"], parameters["density"], parameters["follows"]
            )
            if follows > 0
        }
        if method.name == "ties":
            scale = {"normalize": parameters["normalize"], "lambda": _rounded(parameters["scale"])}
            top["parameters"] = scale
    if origin_name is not None and top["merge_method"] not in ("linear", "slerp"):
        top["base_model"] = origin_name
    listed = [{"model": name, **({"parameters": own} if own else {})} for name, own in given.items()]
    return yaml.safe_dump({"models": listed, **top, "dtype": dtype}, sort_keys=False)


def moe_recipe(
    models: MergeModels, by_expert: Mapping[int, Shares], others: Shares, origin_name: str | None, dtype: str
) -> str | None:
    """Returns mergekit-moe's configuration of a child whose experts are MLPs of dense models; None if they are not.

    Args:
      models: those that were compared.
      by_expert: the shares of each expert, over all layers.
      others: the shares of what is neither expert nor router.
      origin_name: of the origin, as the user gave it.
      dtype: of the child.
    """
    owners = [_owner(models, shares, origin_name) for _, shares in sorted(by_expert.items())]
    base = _owner(models, others, origin_name)
    if base is None or None in owners:
        return None
    given = {
        "base_model": base,
        "gate_mode": "random",
        "dtype": dtype,
        "experts": [{"source_model": owner} for owner in owners],
    }
    return "# for mergekit-moe; the router of the child is made of none of these\n" + yaml.safe_dump(
        given, sort_keys=False
    )


def _owner(models: MergeModels, shares: Shares, origin_name: str | None) -> str | None:
    """Returns the model whose weights these are; None if they are of several, or of none."""
    if shares.undefined or shares.errors.max() > _OWNED:
        return None
    units = np.eye(len(models.names))
    near = [name for name, unit in zip(models.names, units) if np.abs(shares.values - unit).max() < _OWNED]
    if not near and origin_name is not None and np.abs(shares.values).max() < _OWNED:
        return origin_name
    return near[0] if near else None


def _weights(models: MergeModels, choice: Choice, by_place: RoleShares) -> list[Any]:
    assert choice.method is not None
    if choice.method.name == "linear":
        coefficients = np.asarray(choice.method.parameters["coefficients"])
        return [_rounded(share) for share in models.shares_of(coefficients)]
    L = models.child.arch.num_layers
    return [
        _by_role({key: float(s.values[k]) for key, s in by_place.items() if not s.undefined}, L)
        for k in range(len(models.names))
    ]


def _by_role(values: Mapping[tuple[str, int | None], float], num_layers: int) -> Any:
    """Returns one number, or mergekit's list of values by filter, each one number or one for each layer."""
    every = list(values.values())
    if max(every) - min(every) < _SAME:
        return _rounded(float(np.median(every)))
    found: list[dict[str, Any]] = []
    for role, name in FILTERS.items():
        own = {layer: value for (at, layer), value in values.items() if at == role}
        in_layers = [own.get(i, float(np.median(every))) for i in range(num_layers)]
        if any(layer is not None for layer in own):
            same = max(in_layers) - min(in_layers) < _SAME
            found.append({"filter": name, "value": _rounded(in_layers[0]) if same else [*map(_rounded, in_layers)]})
        elif own:
            found.append({"filter": name, "value": _rounded(own[None])})
    return [*found, {"value": _rounded(float(np.median(every)))}]


def _stitched(owners: Mapping[str, str | None], models: MergeModels, dtype: str) -> str:
    L = models.child.arch.num_layers
    by_layer = [owners.get(f"layers/{i}") for i in range(L)]
    of = range(L) if models.layers is None else models.layers[0]
    slices: list[dict[str, Any]] = []
    for i, owner in enumerate(by_layer):
        if i and owner == by_layer[i - 1] and of[i] == of[i - 1] + 1:
            slices[-1]["sources"][0]["layer_range"][1] = of[i] + 1
        else:
            slices.append({"sources": [{"model": owner, "layer_range": [of[i], of[i] + 1]}]})
    text = yaml.safe_dump({"slices": slices, "merge_method": "passthrough", "dtype": dtype}, sort_keys=False)
    others = [f"# {place} is that of {owner}\n" for place, owner in owners.items() if not place.startswith("layers/")]
    return "".join(others) + text


def _of_whole_layers(owners: Mapping[str, str | None]) -> dict[str, str | None] | None:
    """Returns the owners of layers as wholes; None where experts of a layer have others: no slices are made of it."""
    found: dict[str, str | None] = {}
    for place, owner in owners.items():
        whole = place.split("/experts/")[0]
        if found.setdefault(whole, owner) != owner:
            return None
    return found


def _key(models: MergeModels, place: str) -> tuple[str, int | None]:
    name = place.split("[")[0]
    return models.role(name), int(name.split("/")[1]) if name.startswith("layers/") else None


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS)
