"""Prompts from a file, or the first tokens of unprompted texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def read_prompts(file: str | Path) -> list[str]:
    """Returns the prompts of a file: lines of a .txt, strings or objects with `prompt` of a .json or .jsonl.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another kind of file, or one without prompts.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected prompts in a .txt, .json or .jsonl")
    try:
        text = path.read_text("utf-8")
        rows: list[Any] = [line for line in text.split("\n") if line.strip()]
        if path.suffix == ".json":
            rows = json.loads(text)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in rows]
        elif path.suffix != ".txt":
            raise ValueError(f"a file of the kind {path.suffix or '(none)'}, expected .txt, .json or .jsonl")
        prompts = [row["prompt"] if isinstance(row, dict) else row for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no prompts can be read: {error}") from error
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ValueError(f"{path}: expected strings, or objects with a string `prompt`, none of them empty")
    return prompts


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Returns the tokens that end a text, by generation_config.json or else config.json; none if neither names any."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text("utf-8")).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def first_tokens(tokenizer: Any, vocab_size: int, seed: int, count: int) -> list[list[int]]:
    """Returns the first tokens of unprompted texts: BOS, without one EOS, without either a random token each."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [[token]] * count
    drawn = [np.random.default_rng([seed, i]).integers(min(vocab_size, len(tokenizer))) for i in range(count)]
    return [[int(token)] for token in drawn]
