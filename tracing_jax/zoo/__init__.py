"""Many pairs of models: the list, the plan, the folder where workers meet, and one report of all."""

from tracing_jax.zoo.folder import STATES, PairState, ZooFolder
from tracing_jax.zoo.models import FORMS, ModelList, read_models
from tracing_jax.zoo.plan import Plan, PlannedPair, make_plan, read_plan, root_of

__all__ = [
    "FORMS", "STATES", "ModelList", "PairState", "Plan", "PlannedPair", "ZooFolder", "make_plan", "read_models",
    "read_plan", "root_of",
]  # fmt: skip
