"""Other ids for the tokens of a checkpoint: in the files of its tokenizer and wherever a config names a token.

Only JSON files can be changed: `tokenizer.json` (which every fast tokenizer is read from), `vocab.json`,
`added_tokens.json`, `tokenizer_config.json`, `config.json` and `generation_config.json`. A sentencepiece file beside
them would still have the old ids, and is left out.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tracing_jax.checkpoint.errors import CheckpointError

_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")

_Rename = Callable[[int], int]


def permutable_token_ids(folder: Path) -> Int[np.ndarray, " N"]:
    """Returns the ids of the tokens that `tokenizer.json` can give other ids: those of its model's own vocabulary.

    The ids of tokens that were added behind these follow from their number.

    Raises:
      CheckpointError: there is no such file, or it is of another kind.
    """
    vocab = _tokenizer(folder)["model"]["vocab"]
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    return np.sort(np.fromiter(ids, np.int32))


def permute_token_ids(folder: Path, new_ids: Int[np.ndarray, " V"]) -> None:
    """Changes the files of a checkpoint in `folder` so that the token with id i has the id `new_ids[i]`.

    Raises:
      CheckpointError: the tokenizer's format does not allow it.
    """
    fixed = np.setdiff1d(np.arange(len(new_ids)), permutable_token_ids(folder))
    if (new_ids[fixed] != fixed).any():
        raise CheckpointError(
            f"{folder}: only the {len(new_ids) - len(fixed)} tokens of the tokenizer's own vocabulary can be renamed, "
            "not those added behind it, nor ids without a token"
        )

    def rename(token_id: int) -> int:
        return int(new_ids[token_id]) if 0 <= token_id < len(new_ids) else token_id

    for file in sorted(folder.iterdir()):
        if file.name == "tokenizer.json":
            _write(file, _renamed_tokenizer(_tokenizer(folder), rename))
        elif file.name in ("vocab.json", "added_tokens.json"):
            _write(file, {token: rename(i) for token, i in _read(file).items()})
        elif file.name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            _write(file, _renamed_config(_read(file), rename))
        elif file.name.startswith("tokenizer"):
            file.unlink()


def _tokenizer(folder: Path) -> Any:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"{folder}: no tokenizer.json, the only file in which tokens can be renamed")
    tokenizer = _read(file)
    if not isinstance(tokenizer.get("model", {}).get("vocab"), dict | list):
        raise CheckpointError(f"{file}: its model has no vocabulary of tokens")
    return tokenizer


def _renamed_tokenizer(tokenizer: Any, rename: _Rename) -> Any:
    model = tokenizer["model"]
    if isinstance(model["vocab"], list):  # unigram: a token's id is its place
        order = sorted(range(len(model["vocab"])), key=rename)
        model["vocab"] = [model["vocab"][i] for i in order]
        if model.get("unk_id") is not None:
            model["unk_id"] = rename(model["unk_id"])
    else:
        model["vocab"] = dict(sorted(((t, rename(i)) for t, i in model["vocab"].items()), key=lambda item: item[1]))
    added = [token | {"id": rename(token["id"])} for token in tokenizer.get("added_tokens") or []]
    tokenizer["added_tokens"] = sorted(added, key=lambda token: token["id"])
    if tokenizer.get("padding"):
        tokenizer["padding"]["pad_id"] = rename(tokenizer["padding"]["pad_id"])
    _rename_in_processor(tokenizer.get("post_processor") or {}, rename)
    return tokenizer


def _rename_in_processor(processor: Any, rename: _Rename) -> None:
    for inner in processor.get("processors", []):  # a sequence of them
        _rename_in_processor(inner, rename)
    for token in (processor.get("special_tokens") or {}).values():  # a template
        token["ids"] = [rename(i) for i in token["ids"]]
    for name in ("sep", "cls"):  # those of Bert and Roberta
        if name in processor:
            processor[name] = [processor[name][0], rename(processor[name][1])]


def _renamed_config(config: Any, rename: _Rename) -> Any:
    for name, value in config.items():
        if name == "added_tokens_decoder":
            config[name] = {str(rename(int(i))): token for i, token in value.items()}
        elif name.endswith("_token_id") or name in _ID_LISTS:
            config[name] = [rename(i) for i in value] if isinstance(value, list) else _renamed_id(value, rename)
    return config


def _renamed_id(value: Any, rename: _Rename) -> Any:
    return rename(value) if isinstance(value, int) else value  # null where the model has no such token


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
