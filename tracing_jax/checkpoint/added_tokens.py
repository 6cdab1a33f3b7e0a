"""Adapters that were trained with more tokens than their base has: embedding and head are in them, with more rows.

PEFT's AutoPeftModelForCausalLM resizes the base before it loads such an adapter. Rows that the adapter does not hold
are drawn anew there, so that a head or an embedding without its new rows is no model.
"""

from collections.abc import Collection, Mapping

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import shortened

Ends = tuple[str, str]
"""The names of the tensors of the embedding and of the head."""


def saved_again(names: Collection[str]) -> set[str]:
    """Returns the tensors of an adapter that another takes the place of.

    PEFT saves embedding and head once more, without `modules_to_save` in their names, where the vocabulary was resized,
    and then also `original_module`, the module as it was before training.
    """
    found = set()
    for name in names:
        before, original, after = name.partition(".original_module.")
        if original and any(f"{before}.modules_to_save.{end}" in names for end in (after, f"default.{after}")):
            found |= {name, f"{before}.{after}"}
    return found


def shapes_with_tokens(
    base: TensorStore, adapter: TensorStore, parts: Mapping[str, Mapping[str, str]], ends: Ends | None
) -> dict[str, tuple[int, ...]]:
    """Returns the shape that each tensor of the base has once the tokens of an adapter are added.

    Args:
      base: the tensors of the base.
      adapter: those of the adapter.
      parts: target in the base -> part of the update, `whole` for one that is saved whole -> its name in the adapter.
      ends: of the base, if known.
    """
    rows = _rows_by_token(ends)
    found = {}
    for target, names in parts.items():
        shape = base.shape(target)
        saved = adapter.shape(names["whole"]) if "whole" in names else ()
        grows = target in rows and saved[1:] == shape[1:] and len(saved) == len(shape) and saved > shape
        found[target] = saved if grows else shape
    return found


def check_added_tokens(base: TensorStore, adapter: TensorStore, replaced: Mapping[str, str], ends: Ends | None) -> None:
    """Makes sure that embedding, head and the head's bias, where there is one, have the same new tokens.

    Args:
      base: the tensors of the base.
      adapter: those of the adapter.
      replaced: target in the base -> the tensor of the adapter that takes its place.
      ends: of the base, if known; one of them may be absent, if they are tied.

    Raises:
      CheckpointError: some lack the new tokens.
    """
    rows = {name: base.shape(name)[0] for name in _rows_by_token(ends) if name in base.names()}
    after = {name: adapter.shape(replaced[name])[0] if name in replaced else count for name, count in rows.items()}
    grown = {name: count for name, count in after.items() if count > rows[name]}
    if not grown:
        return
    if left := [name for name, count in after.items() if count != max(grown.values())]:
        first = next(iter(grown))
        raise CheckpointError(
            f"{replaced[first]!r} has {grown[first]} tokens, the base {rows[first]}, and {shortened(left[0])} is not "
            "in the adapter with as many: its new rows were drawn by chance when the model was resized; save both "
            "(modules_to_save), or merge with PEFT where they are known"
        )


def _rows_by_token(ends: Ends | None) -> tuple[str, ...]:
    return () if ends is None else (*ends, ends[1].removesuffix("weight") + "bias")
