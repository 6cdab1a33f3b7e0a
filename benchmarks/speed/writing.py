"""Greedy text by `generate.py`'s engine and by transformers' `generate`, on the same checkpoint and prompts."""

import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Int

from benchmarks.speed.rows import Row
from benchmarks.speed.sizes import SIZES
from tracing_jax.checkpoint import load, open_checkpoint
from tracing_jax.generation import Sampler, SamplingParams
from tracing_jax.sharding import Compute, make_mesh

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 8, 32, 64


def writing(size_name: str, folder: Path) -> Iterator[Row]:
    """Yields the tokens per second that we write, beside PyTorch; nothing where it is not installed."""
    if find_spec("torch") is None:
        print("writing: left out, torch is not installed (pip install -e '.[bench]')")
        return
    base, _ = SIZES[size_name].pair(folder)
    vocab_size = SIZES[size_name].arch.vocab_size
    prompts = np.random.default_rng(0).integers(vocab_size, size=(_PROMPTS, _PROMPT_TOKENS))
    ours, first = _ours(base, prompts)
    theirs, found = _theirs(base, prompts)
    same = np.mean([a == b for a, b in zip(first, found, strict=True)])
    tokens = _PROMPTS * _NEW_TOKENS
    note = (
        f"{_PROMPTS} prompts of {_PROMPT_TOKENS} tokens, {_NEW_TOKENS} new ones, float32; {same:.0%} of texts the same"
    )
    yield Row("writing", "greedy, compiled before", tokens / ours, tokens / theirs, "tokens/s", "transformers", note)


def _ours(base: Path, prompts: Int[np.ndarray, "N T"]) -> tuple[float, list[list[int]]]:
    mesh = make_mesh()
    sampler = Sampler(load(open_checkpoint(str(base)), mesh), Compute(mesh, len(prompts)), SamplingParams(0.0))
    rows = prompts.tolist()
    found = dict(sampler.sample(rows, _NEW_TOKENS))
    start = time.perf_counter()
    dict(sampler.sample(rows, _NEW_TOKENS))
    return time.perf_counter() - start, [found[i] for i in range(len(rows))]


def _theirs(base: Path, prompts: Int[np.ndarray, "N T"]) -> tuple[float, list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompts)
    settings = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        model.generate(ids[:, :2], attention_mask=torch.ones_like(ids[:, :2]), **settings)
        start = time.perf_counter()
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return time.perf_counter() - start, found[:, prompts.shape[1] :].tolist()
