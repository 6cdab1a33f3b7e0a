"""Hugging Face checkpoints <-> param trees: reading, writing, the Hub, adapters, and an Orbax cache."""

from tracing_jax.checkpoint.cache import load
from tracing_jax.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tracing_jax.checkpoint.device_loading import OnMesh, on_mesh
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.renaming import renameable_ids
from tracing_jax.checkpoint.writing import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "OnMesh",
    "load",
    "on_mesh",
    "open_checkpoint",
    "renameable_ids",
    "save_checkpoint",
]
