"""Models of which only the weights are understood: their parts are found by names, shapes and numbers.

Nothing of a repository's code is executed; of its config, plain JSON, a few attributes are read.
"""

from tracing_jax.checkpoint.weights_only.building import Built, build, unused
from tracing_jax.checkpoint.weights_only.description import Description, with_layout
from tracing_jax.checkpoint.weights_only.finding import describe
from tracing_jax.checkpoint.weights_only.names import COMPONENTS, sizes_of_components

__all__ = ["COMPONENTS", "Built", "Description", "build", "describe", "sizes_of_components", "unused", "with_layout"]
