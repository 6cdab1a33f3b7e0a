"""A model's texts as a file: `<id>_gentext.json`, a list of {prompt, text, tokens, seed}."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracing_jax.arch import head_problem, length_problem
from tracing_jax.checkpoint import Checkpoint, load
from tracing_jax.data import GENERATED_ENDING, load_tokenizer
from tracing_jax.distributed import is_main_process
from tracing_jax.generation.decoding import Sampler
from tracing_jax.generation.prompts import end_tokens, first_tokens
from tracing_jax.generation.sampling import SamplingParams
from tracing_jax.progress import tqdm
from tracing_jax.record import atomic_write
from tracing_jax.sharding import Compute


def file_of(folder: Path, model_id: str) -> Path:
    """Returns the file of the texts of a model, named by its id or by the last name of its path."""
    if model_id.startswith(("/", ".", "~")):
        model_id = Path(model_id).expanduser().resolve().name
    return folder / (re.sub(r"[^A-Za-z0-9._-]+", "-", model_id).strip("-.") + GENERATED_ENDING)


def prompt_tokens(
    model: Checkpoint, prompts: Sequence[str] | int, max_new_tokens: int, seed: int
) -> tuple[Any, list[list[int]]]:
    """Returns the model's tokenizer, and the tokens of the prompts, or the first tokens of so many unprompted texts.

    Raises:
      FileNotFoundError: the model has no tokenizer.
      ValueError: the model predicts no tokens; no prompts, or a text in place of the list; a prompt is empty, has no
        token, or one without an embedding, or is with what is to follow longer than the model can read.
    """
    if problem := head_problem(model.arch):
        raise ValueError(f"{model.id}: {problem}; it can write no text")
    if isinstance(prompts, str):
        raise ValueError(f"prompts: one text, {prompts[:40]!r}; expected a list of texts, such as [text]")
    if not prompts or (not isinstance(prompts, int) and not all(prompts)):
        raise ValueError("prompts: at least one, none of them empty; or the number of texts without a prompt")
    tokenizer = load_tokenizer(model.tokenizer_folder)
    if isinstance(prompts, int):
        found = first_tokens(tokenizer, model.arch.vocab_size, seed, prompts)
    else:
        found = [list(tokenizer(prompt, verbose=False)["input_ids"]) for prompt in prompts]
        if empty := [prompt for prompt, tokens in zip(prompts, found) if not tokens]:
            raise ValueError(f"{model.id}: the prompt {empty[0]!r} has no token; leave it out")
    if (most := max(map(max, found))) >= model.arch.vocab_size:
        raise ValueError(
            f"{model.id}: its tokenizer gives the id {most}, and there are {model.arch.vocab_size} embeddings; put the "
            "tokenizer of this model into its folder"
        )
    longest = max(map(len, found)) + max_new_tokens
    if problem := length_problem(model.arch, longest):
        raise ValueError(f"{model.id}: the longest prompt and what is to follow: {problem}, or fewer max_new_tokens")
    return tokenizer, found


def continuations(
    model: Checkpoint,
    prompts: Sequence[str] | int,
    compute: Compute,
    params: SamplingParams,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Returns sampled continuations of prompts, or so many unprompted texts, as `{prompt, text, tokens, seed}`.

    The recorded prompt of an unprompted text is its first token, decoded without special tokens.

    Raises:
      ValueError: settings out of range, all at once; and see `prompt_tokens`.
      FileNotFoundError: see `prompt_tokens`.
    """
    lines = params.problems()
    lines += [] if max_new_tokens >= 1 else [f"max_new_tokens={max_new_tokens}: at least 1"]
    lines += [] if 0 <= seed < 2**32 else [f"seed={seed}: at least 0 and below 2**32"]
    if lines:
        raise ValueError("; ".join(lines))
    tokenizer, rows = prompt_tokens(model, prompts, max_new_tokens, seed)
    sampler = Sampler(load(model, compute.mesh), compute, params, end_tokens(model.folder), seed)
    texts: dict[int, list[int]] = {}
    with tqdm(total=len(rows) * max_new_tokens, desc=f"{model.id}", unit="token", disable=None) as bar:
        for i, tokens in sampler.sample(rows, max_new_tokens, bar.update):
            texts[i] = tokens
    names = [_decoded(tokenizer, row) for row in rows] if isinstance(prompts, int) else prompts
    decoded = [_following(tokenizer, row, texts[i]) for i, row in enumerate(rows)]
    return [
        {"prompt": prompt, "text": text, "tokens": texts[i], "seed": seed}
        for i, (prompt, text) in enumerate(zip(names, decoded, strict=True))
    ]


def generate_texts(
    model: Checkpoint,
    prompts: Sequence[str] | int,
    file: Path,
    compute: Compute,
    params: SamplingParams,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> Path:
    """Writes the `continuations` of prompts into a file, and returns its path.

    Raises:
      ValueError, FileNotFoundError: see `continuations`.
    """
    content = continuations(model, prompts, compute, params, max_new_tokens, seed)
    if is_main_process():
        atomic_write(file, json.dumps(content, ensure_ascii=False, indent=1).encode())
    return file


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _following(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Returns the text of the tokens that follow a prompt."""
    # SentencePiece tokenizers drop the space before the first word of what they decode: prompt and text go together.
    before, whole = _decoded(tokenizer, prompt), _decoded(tokenizer, [*prompt, *tokens])
    # A prompt may end within a character, which its first tokens complete.
    return whole.removeprefix(before) if whole.startswith(before) else _decoded(tokenizer, tokens)
