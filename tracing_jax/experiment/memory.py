"""Whether a run keeps both models in memory or streams them layer by layer."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tracing_jax.checkpoint import Checkpoint
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment.inputs import RunInputs
from tracing_jax.experiment.validation import IN_MEMORY
from tracing_jax.host_memory import free_memory
from tracing_jax.options import RunOptions
from tracing_jax.sharding import make_mesh

_SHARE = 0.7
"""Of what is free, the most that weights may take; activations, similarities and interpolated layers need the rest."""

_GIB = 2**30


class Placement(NamedTuple):
    """The devices of a run, and whether both models are `resident` there, or `stream` through them layer by layer."""

    mesh: Mesh
    memory: str


def choose_placement(options: RunOptions, inputs: RunInputs) -> Placement:
    """Returns where the models of a run will be, and notes why.

    Raises:
      ConfigError: a curve is to be trained between models that would be streamed.
    """
    mesh = make_mesh(options.mesh.data, options.mesh.model)
    asked = options.memory
    if asked == "auto" and (inputs.needs_resident or inputs.reads_few_weights):
        asked = "stream" if inputs.reads_few_weights else "resident"
    memory, reason = choose_memory(asked, (inputs.base, inputs.ft), mesh)
    if inputs.trains_curve and memory == "stream":
        raise ConfigError(f"mode.path=bezier: {IN_MEMORY}. {reason}; set memory=resident, or mode.path=linear")
    inputs.notes.append(reason)
    logging.info("%s", reason)
    return Placement(mesh, memory)


def choose_memory(asked: str, models: Sequence[Checkpoint], mesh: Mesh) -> tuple[str, str]:
    """Returns `resident` or `stream`, and the reason in a sentence."""
    if asked != "auto":
        return asked, f"memory: {asked}, as asked for"
    wanted, free = sum(model.num_bytes for model in models), free_bytes(mesh)
    if free is None:
        return "resident", "memory: resident; how much is free is not known here"
    found = "resident" if wanted <= _SHARE * free else "stream"
    sizes = f"both models take {wanted / _GIB:.3g} GiB, {free / _GIB:.3g} GiB are free on the devices of the mesh"
    return found, f"memory: {found}; {sizes}"


def free_bytes(mesh: Mesh) -> int | None:
    """Returns how many bytes the mesh's devices have left, the same to every process; None if they do not report it."""
    free = _free_here(mesh)
    if jax.process_count() == 1:
        return free
    # In float32, for JAX has no wider integers by default.
    found = multihost_utils.process_allgather(np.float32(-1 if free is None else free))
    if found.min() < 0:
        return None
    # Processes on CPUs may share one machine's memory, and each reports how much of it is left.
    return int(found.min() if mesh.devices.flat[0].platform == "cpu" else found.sum())


def _free_here(mesh: Mesh) -> int | None:
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if devices[0].platform == "cpu":
        return free_memory()
    stats = [device.memory_stats() for device in devices]
    if not all(found and "bytes_limit" in found for found in stats):
        return None
    return sum(found["bytes_limit"] - found.get("bytes_in_use", 0) for found in stats)
