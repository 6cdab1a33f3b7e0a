"""What a recipe leaves of the child when it is applied: over all entries, from the products that one pass has summed.

TIES needs the entries themselves, and DARE drops them at random: of these there is the residual of held-out entries.

Letters: T terms, C columns.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float

from tracing_jax.merges.choice import Choice, name_of_unit, units_of
from tracing_jax.merges.methods import group_of, slerp_weights
from tracing_jax.merges.models import MergeModels, TensorKey
from tracing_jax.merges.normal_equations import NormalEquations, TensorSums
from tracing_jax.merges.recipe import FILTERS

Coefficients = Float[np.ndarray, " T+1"]
"""Of the differences from the reference, and of the reference itself, in a merge less the reference."""


def recipe_residual(
    text: str, models: MergeModels, sums: NormalEquations, choice: Choice, origin_name: str | None
) -> float | None:
    """Returns the squares that are left of the child's difference, over all tensors that are compared.

    The merge is not rounded to the child's dtype. None where it cannot be told from sums of products.

    Args:
      text: the recipe.
      models: those that were compared.
      sums: of one pass over them.
      choice: the method, by which the owners of parts of a stitched child are known.
      origin_name: of the origin, as the recipe calls it.
    """
    config = yaml.safe_load(text)
    named = [name_of_unit(models, unit) for unit in range(models.terms + 1)]
    units = {str(origin_name if name is None else name): unit for name, unit in zip(named, units_of(models))}
    rest = total = 0.0
    for tensor in sums.tensors:
        found = _coefficients(config, models, tensor, choice, units)
        if found is None:
            return None
        signed = np.concatenate([[1.0], -found])
        rest += max(0.0, float(signed @ tensor.gram @ signed))
        total += float(tensor.gram[0, 0])
    return rest / total if total else 0.0


def _coefficients(
    config: Mapping[str, Any],
    models: MergeModels,
    tensor: TensorSums,
    choice: Choice,
    units: Mapping[str, Float[np.ndarray, " T"]],
) -> Coefficients | None:
    place, name = tensor.place, config.get("merge_method")
    if name == "passthrough":
        assert choice.method is not None
        of = choice.method.parameters["of"]
        owner = of if isinstance(of, int) else of.get(group_of(place), 0)
        return np.append(units_of(models)[owner], 0.0)
    if name == "slerp":
        one, other = (units[own["model"]] for own in config["models"])
        t = _value(config["parameters"]["t"], models, place)
        s, u = slerp_weights(tensor.gram, one, other, t)
        return np.append(s * one + u * other, s + u - 1)
    if name not in ("linear", "task_arithmetic"):
        return None
    weights = [_value(own["parameters"]["weight"], models, place) for own in config["models"]]
    whole = sum(weights) if name == "linear" else 1.0  # as mergekit does by default
    return np.append(sum(w / whole * units[own["model"]] for w, own in zip(weights, config["models"])), 0.0)


def _value(given: Any, models: MergeModels, place: TensorKey) -> float:
    """Returns the number that a tensor gets of one by filter and by layer."""
    if isinstance(given, list) and isinstance(given[0], dict):
        own = FILTERS.get(models.role(place.name))
        given = next(one["value"] for one in given if one.get("filter", own) == own)
    return float(given[place.layer or 0] if isinstance(given, list) else given)
