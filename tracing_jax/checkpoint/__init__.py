"""Hugging Face checkpoints <-> param trees: reading, writing, the Hub, adapters, and an Orbax cache."""

from tracing_jax.checkpoint.cache import load
from tracing_jax.checkpoint.checkpoint import Checkpoint
from tracing_jax.checkpoint.device_loading import ShardedCheckpoint
from tracing_jax.checkpoint.direct_reading import fits_page_cache
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.hub import hub_problem, tokenizer_folder
from tracing_jax.checkpoint.opening import WeightsOnly, inspect_checkpoint, open_checkpoint
from tracing_jax.checkpoint.read_buffer import ReadBuffer
from tracing_jax.checkpoint.token_ids import permutable_token_ids
from tracing_jax.checkpoint.writing import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ReadBuffer",
    "ShardedCheckpoint",
    "WeightsOnly",
    "fits_page_cache",
    "hub_problem",
    "inspect_checkpoint",
    "load",
    "open_checkpoint",
    "permutable_token_ids",
    "save_checkpoint",
    "tokenizer_folder",
]
