"""What a module of a format finds in a checkpoint: tensors that it dequantises, and those that are used up for it."""

from dataclasses import dataclass, field

from tracing_jax.checkpoint.derived_tensors import Derived
from tracing_jax.checkpoint.errors import CheckpointError


class QuantisedError(CheckpointError):
    """Quantised weights that are damaged, or stored in a way that is not read."""


@dataclass
class Found:
    """The tensors of one format.

    Attributes:
      format: its name, for messages.
      derived: name of a weight -> how it is dequantised.
      used: names of stored tensors that are parts of these.
    """

    format: str
    derived: dict[str, Derived] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def add(self, name: str, tensor: Derived, *used: str) -> None:
        """Adds a weight and the stored tensors that it is made of."""
        self.derived[name] = tensor
        self.used |= {*used} - {name}
