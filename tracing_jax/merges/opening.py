"""Models by the names that a user gives, with the tokens that they share by string."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from tracing_jax.checkpoint import Checkpoint
from tracing_jax.data import load_tokenizer, same_tokenizer
from tracing_jax.merges.models import MergeError, MergeModels


def opened_models(child: Checkpoint, parents: dict[str, Checkpoint], origin: Checkpoint | None) -> MergeModels:
    """Returns open models as those of a merge; their tokens are paired by string where vocabularies differ.

    Raises:
      MergeError: a parent is the child itself, or two parents are the same files.
    """
    every = {"the child": child, **parents} | ({} if origin is None else {"the base": origin})
    folders: dict[tuple[object, ...], str] = {}
    for name, model in every.items():
        key = (model.folder.resolve(), model.revision)
        if key in folders and "the child" not in (name, folders[key]):
            raise MergeError(f"{name} and {folders[key]} are the same files ({model.folder}); name each model once")
        folders[key] = name
    models = [child, *([] if origin is None else [origin]), *parents.values()]
    return MergeModels(child, parents, origin, shared_rows(models))


def same_files(one: Checkpoint, other: Checkpoint) -> bool:
    """Returns whether two models are read from the same files."""
    return (one.folder.resolve(), one.revision) == (other.folder.resolve(), other.revision)


def not_comparable(child: Checkpoint, model: Checkpoint) -> str | None:
    """Returns why no layer of a model can be compared with those of the child; None if one can."""
    pair = MergeModels(child, {"model": model})
    if any(place.layer is not None for place in pair.places()):
        return None
    reasons = [reason for name, reason in pair.left_out.items() if name.startswith("layers/")]
    return max(dict.fromkeys(reasons), key=reasons.count, default="it has no layers")


def shared_rows(models: Sequence[Checkpoint]) -> tuple[Int[np.ndarray, " S"], ...] | None:
    """Returns the ids of the tokens that all models have, by string, in the order of the models.

    None where one tokenizer serves all and their embeddings have equal sizes, or where one cannot be read.
    """
    try:
        tokenizers = [load_tokenizer(model.tokenizer_folder) for model in models]
    except (FileNotFoundError, ValueError):
        return None
    same = all(same_tokenizer(tokenizers[0], other) for other in tokenizers[1:])
    sizes = [model.arch.vocab_size for model in models]
    if same and len(set(sizes)) == 1:
        return None
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    shared = functools.reduce(set.intersection, (set(vocabulary) for vocabulary in vocabularies))
    ids = np.array([[vocabulary[token] for vocabulary in vocabularies] for token in sorted(shared)], np.int32)
    ids = ids.reshape(-1, len(models))
    ids = ids[(ids < np.array(sizes)).all(axis=1)]
    return tuple(ids[np.argsort(ids[:, 0])].T)
