"""Texts sampled from models, in batches, with a cache of keys and values."""

from tracing_jax.generation.decoding import Sampler
from tracing_jax.generation.prompts import end_tokens, first_tokens, read_prompts
from tracing_jax.generation.sampling import SamplingParams, filtered, sample
from tracing_jax.generation.texts import continuations, file_of, generate_texts, prompt_tokens

__all__ = [
    "Sampler", "SamplingParams", "continuations", "end_tokens", "file_of", "filtered", "first_tokens", "generate_texts",
    "prompt_tokens", "read_prompts", "sample",
]  # fmt: skip
