"""Text from models: batched sampling with a cache of keys and values."""

from tracing_jax.generation.decoding import Writer
from tracing_jax.generation.prompts import end_tokens, first_tokens, read_prompts
from tracing_jax.generation.sampling import Choice, chosen, filtered
from tracing_jax.generation.texts import file_of, generate, prompt_tokens

__all__ = [
    "Choice", "Writer", "chosen", "end_tokens", "file_of", "filtered", "first_tokens", "generate",
    "prompt_tokens", "read_prompts",
]  # fmt: skip
