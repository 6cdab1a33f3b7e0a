"""Many pairs of models: the list, the plan, the folder that workers share, and one report of all."""

from tracing_jax.zoo.folder import STATES, PairState, ZooFolder
from tracing_jax.zoo.plan import (
    ModelList,
    PlannedPair,
    Proposal,
    ZooPlan,
    make_plan,
    read_models,
    read_plan,
    root_of,
)

__all__ = [
    "STATES",
    "ModelList",
    "PairState",
    "PlannedPair",
    "Proposal",
    "ZooFolder",
    "ZooPlan",
    "make_plan",
    "read_models",
    "read_plan",
    "root_of",
]  # fmt: skip
