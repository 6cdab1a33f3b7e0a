"""How often, and for how long, XLA compiles while a block runs, by the name of what it compiles."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax

_PREFIX = "/jax/core/compile/"
_BACKEND = _PREFIX + "backend_compile_duration"


@dataclass
class Compilations:
    """What was seen so far.

    Attributes:
      seconds: spent tracing, lowering and compiling, all together.
      count: name of the function -> times that it was compiled.
    """

    seconds: float = 0.0
    count: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Compilations of all functions together."""
        return sum(self.count.values())


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
    """Counts the compilations of this process while the block runs."""
    found, active = Compilations(), True

    def listen(event: str, duration_secs: float, **facts: str | int) -> None:
        if not active or not event.startswith(_PREFIX):
            return
        found.seconds += duration_secs
        if event == _BACKEND:
            found.count[re.sub(r"^jit\((.*)\)$", r"\1", str(facts.get("fun_name", "?")))] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        active = False  # there is no public way to take a listener away
