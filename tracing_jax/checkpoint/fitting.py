"""How the tensors of a checkpoint fit the model that its config describes, and what is wrong where they do not."""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tracing_jax.arch import Arch, keys_of
from tracing_jax.checkpoint.derived_tensors import Alias, Cast, DerivedTensors, RenamedTensors, Transposed
from tracing_jax.checkpoint.errors import CheckpointError, MisfitError
from tracing_jax.checkpoint.hf_layouts import LeafLayouts, leaf_layouts
from tracing_jax.checkpoint.name_patterns import (
    ignored_notes,
    is_constant,
    layer_number,
    num_experts_in,
    num_layers_in,
    plain_names,
    unknown_prefix,
)
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import counted, grouped, listed, shortened

_ROWS_PER_READ = 4096  # of the embedding, compared at a time
_FEW_ROWS = 16  # in which most that differ do
_FEW_LAYERS = 200  # of as many the missing tensors can be listed
_FEW_EXPERTS = 25_000  # of all layers together; no model has many more
_MAX_EXTRA = 5000
_WHOLE_LAYER = 4  # tensors: no layer has fewer
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Fitted:
    """A model whose tensors are all there, and notes on what was done for that."""

    arch: Arch
    tensors: TensorStore
    notes: tuple[str, ...]


def with_plain_names(arch: Arch, store: TensorStore) -> tuple[TensorStore, list[str]]:
    """Returns the tensors of a model under the names that transformers gives them, and a note where they had others.

    Raises:
      CheckpointError: two tensors would have the same name, or the model has far more layers or experts than the files.
    """
    if arch.num_layers > _FEW_LAYERS and arch.num_layers > 2 * (found := num_layers_in(store.names())):
        raise CheckpointError(f"config.json specifies {arch.num_layers} layers, the files have tensors of {found}")
    if arch.num_layers * (arch.num_experts or 0) > _FEW_EXPERTS:
        found = num_experts_in({name: store.shape(name) for name in store.names()})
        if found < (arch.num_experts or 0):
            raise CheckpointError(
                f"config.json specifies {arch.num_experts} experts, the files have tensors of {found}"
            )
    stored_names = plain_names(store.names(), tensor_shapes(leaf_layouts(arch).values()))
    changed = [(name, stored) for name, stored in stored_names.items() if name != stored]
    if not changed:
        return store, []
    name, stored = changed[0]
    note = f"{len(changed)} of {len(stored_names)} tensors were renamed: {shortened(stored)} is {shortened(name)}"
    return RenamedTensors(store, stored_names), [note]


def tied_names(arch: Arch, names: Collection[str]) -> tuple[str, str]:
    """Returns the names of the tensors of the embedding and of the head, whether or not the head is there."""
    both = ("embed/embedding", "head/lm_head/kernel")
    layouts = leaf_layouts(replace(arch, tied=False), names, both)
    return layouts[both[0]].slices[0].tensor, layouts[both[1]].slices[0].tensor


def fitted(arch: Arch, store: TensorStore, *, compare_rows: bool = True) -> Fitted:
    """Returns the model of these tensors, untied where they say so, in dtypes that are computed with.

    Args:
      arch: the facts of the model by its config.
      store: its tensors, under plain names.
      compare_rows: whether a head that is stored beside the embedding of a tied model is compared with it whole now;
        otherwise a few rows are, and the others as they are read.

    Raises:
      CheckpointError: tensors are missing, unexpected or of the wrong shape or dtype, all at once; a `MisfitError` if
        names or shapes are not those that the config asks for.
    """
    store, rounding = without_float64(store)
    arch, store, tying = tied_as_stored(arch, store, compare_rows)
    if not arch.tied and (head := tied_names(arch, store.names())[1]) not in store.names():
        arch, tying = replace(arch, tied=True, has_head=False), [f"{head} is missing: the model predicts no tokens"]
    store, turning = _turned(arch, store)
    return Fitted(arch, store, (*rounding, *tying, *turning, *_checked(arch, store)))


def _turned(arch: Arch, store: TensorStore) -> tuple[TensorStore, list[str]]:
    """Returns the tensors with stacked experts as transformers holds them: files of Qwen3-VL have them transposed.

    Like transformers, this transposes a tensor whose shape fits only so.
    """
    names = set(store.names())
    if not arch.num_experts or not any(len(store.shape(name)) == 3 for name in names):
        return store, []  # one of 256 experts a layer has 70,000 tensors, whose layouts take seconds
    turned = {}
    for name, shape in tensor_shapes(leaf_layouts(arch, names).values()).items():
        if len(shape) == 3 and name in names and shape[1] != shape[2] and len(store.shape(name)) == 3:
            found = Transposed(store, name)
            if found.shape == shape:
                turned[name] = found
    if not turned:
        return store, []
    many = counted(len(turned), "tensor is", "tensors are")
    return DerivedTensors(store, turned), [f"{many} stored transposed: {listed(turned, 3)}"]


def without_float64(store: TensorStore) -> tuple[TensorStore, list[str]]:
    """Returns the tensors with float64 as float32, and a note where there are any."""
    wide = {name: Cast(store, name, np.dtype(np.float32)) for name in store.names() if store.dtype(name) == np.float64}
    if not wide:
        return store, []
    many = counted(len(wide), "tensor is float64 and was", "tensors are float64 and were")
    return DerivedTensors(store, wide), [f"{many} rounded to float32"]


def tied_as_stored(arch: Arch, store: TensorStore, compare_rows: bool = True) -> tuple[Arch, TensorStore, list[str]]:
    """Returns a model whose config ties its head to the embedding as its tensors have it, as transformers does.

    Args:
      arch: the facts of the model by its config.
      store: its tensors, under plain names.
      compare_rows: see `fitted`.

    Returns:
      The model, untied if its head differs from its embedding; its tensors; notes on what was done.
    """
    if not arch.tied:
        return arch, store, []
    names = set(store.names())
    embedding, head = tied_names(arch, names)
    if head not in names:
        return arch, store, []
    if embedding not in names:
        note = f"{shortened(embedding)} is not in the files; the embedding is {shortened(head)}, to which it is tied"
        return arch, DerivedTensors(store, {embedding: Alias(store, head)}, {head}), [note]
    if _are_equal(store, embedding, head, compare_rows):
        return arch, DerivedTensors(store, {}, {head}) if compare_rows else store, []
    note = f"{head} differs from the embedding, so the two are not tied, although config.json says tie_word_embeddings"
    return replace(arch, tied=False), store, [note]


def _are_equal(store: TensorStore, embedding: str, head: str, whole: bool) -> bool:
    """Returns whether two tensors are equal; unless `whole`, in a few rows of the beginning, middle and end."""
    if store.shape(embedding) != store.shape(head):
        return False
    rows = store.shape(embedding)[0] if store.shape(embedding) else 0
    few = [slice(start, min(start + _FEW_ROWS, rows)) for start in (0, rows // 2, max(0, rows - _FEW_ROWS))]
    bounds = [*range(_FEW_ROWS, rows, _ROWS_PER_READ), rows]
    for span in few + [slice(*pair) for pair in itertools.pairwise(bounds)] if whole else few:
        ours, theirs = store.read_many([(name, (span,)) for name in (embedding, head)])
        if not np.array_equal(ours, theirs):
            return False
    return True


def _checked(arch: Arch, store: TensorStore) -> list[str]:
    """Returns notes on extra tensors that are left out; raises if the tensors are not those of the model."""
    names = set(store.names())
    layouts = leaf_layouts(arch, names)
    wanted = tensor_shapes(layouts.values())
    if prefix := unknown_prefix(names, wanted):
        example = shortened(prefix + next(name for name in wanted if prefix + name in names))
        raise CheckpointError(
            f"the names of all tensors begin with {shortened(prefix)!r}, as in {example}: rename them"
        )
    missing = {name: shape for name, shape in wanted.items() if name not in names}
    found = {name: shape for name, shape in wanted.items() if name in names}
    unread = [*_unread_dtypes(store, found), *_mixed_dtypes(layouts, store, names)]
    extra = sorted(name for name in names - wanted.keys() if not is_constant(name))
    if arch.tied:
        head = tied_names(arch, names)[1]  # compared when the embedding is read
        extra = [name for name in extra if name != head]
    ignored, notes = ignored_notes(extra if len(extra) <= _MAX_EXTRA else ())  # of a million names it takes seconds
    if later := [
        name for name in extra if arch.num_layers <= layer_number(name) < arch.num_layers + arch.prediction_layers
    ]:
        many = counted(len(later), "tensor is", "tensors are")
        notes.append(f"{many} left out, of layers that predict further tokens: {listed(later, 3)}")
        ignored |= set(later)
    if unread_keys := _of_shared_keys(arch, extra):
        many = counted(len(unread_keys), "tensor is", "tensors are")
        notes.append(f"{many} left out, of layers that read the keys of earlier ones: {listed(unread_keys, 3)}")
        ignored |= set(unread_keys)
    unexpected = {name: store.shape(name) for name in extra if name not in ignored}
    misshapen = {name: shape for name, shape in found.items() if store.shape(name) != shape}
    lost, others = _lost(arch, missing, names), _unexpected(arch, unexpected)
    lines = grouped([*lost, *_misshapen(store, misshapen), *unread, *others])
    if missing or misshapen or unexpected:
        is_whole = not unread and _are_replaced(missing, unexpected) and _of_other_vocab(arch, store, misshapen)
        raise MisfitError(*lines, is_whole=is_whole)
    if lines:
        raise CheckpointError(*lines)
    return notes


def _of_shared_keys(arch: Arch, extra: Iterable[str]) -> list[str]:
    """Returns the projections and norms of keys and values of layers that have none."""
    shared = {i for i in range(arch.num_layers) if any(map(keys_of, arch.mixers_of(i)))}
    modules = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "v_norm.weight", "k_proj.bias", "v_proj.bias")
    return [name for name in extra if layer_number(name) in shared and name.endswith(modules)]


def _lost(arch: Arch, missing: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> list[str]:
    """Returns the tensors that are missing; of a layer of which there is none, the layer alone."""
    there = {layer_number(name) for name in names} | {-1}
    whole = {i: name for name in missing if (i := layer_number(name)) not in there}
    lines = [
        f"missing tensor {_of_layer(name, i)} and all others of this layer; config.json specifies "
        f"{arch.num_layers} layers"
        for i, name in whole.items()
    ]
    return lines + [
        f"missing tensor {name} {shape}" for name, shape in missing.items() if layer_number(name) not in whole
    ]


def _unexpected(arch: Arch, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    if len(shapes) > _MAX_EXTRA:
        return [f"{len(shapes)} unexpected tensors, {shortened(next(iter(shapes)))} first"]
    by_layer: dict[int, list[str]] = {}
    for name in shapes:
        by_layer.setdefault(layer_number(name), []).append(name)
    behind = {i: names[0] for i, names in by_layer.items() if i >= arch.num_layers and len(names) >= _WHOLE_LAYER}
    lines = [
        f"unexpected tensor {_of_layer(name, i)} and all others of this layer; config.json specifies {arch.num_layers} "
        "layers"
        for i, name in behind.items()
    ]
    others = {name: shape for name, shape in shapes.items() if layer_number(name) not in behind}
    return lines + [f"unexpected tensor {shortened(name, 200)} {shape}" for name, shape in others.items()]


def _of_layer(name: str, layer: int) -> str:
    return f"{shortened(name[: name.index(f'.{layer}.')])}.{layer}.*"


def _are_replaced(missing: Mapping[str, tuple[int, ...]], unexpected: Mapping[str, tuple[int, ...]]) -> bool:
    """Returns whether each layer has about as many weights under other names as it lacks; a lost part has none."""
    lost, others = (_weights_by_layer(shapes) for shapes in (missing, unexpected))
    return all(2 * others.get(layer, 0) >= weights for layer, weights in lost.items())


def _weights_by_layer(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for name, shape in shapes.items():
        layer = layer_number(name)
        found[layer] = found.get(layer, 0) + math.prod(shape)
    return found


def _of_other_vocab(arch: Arch, store: TensorStore, misshapen: Mapping[str, tuple[int, ...]]) -> bool:
    """Returns whether tensors of the wrong shape are embedding and head, with as many tokens as each other."""
    ends = [name for name in tied_names(arch, store.names()) if name in store.names()]
    if not misshapen:
        return True
    others = all(name in ends and store.shape(name)[1:] == shape[1:] for name, shape in misshapen.items())
    return others and len({store.shape(name)[:1] for name in ends}) == 1


def _misshapen(store: TensorStore, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [
        f"wrong shape of {name}: {store.shape(name)}, config.json specifies {shape}" for name, shape in wanted.items()
    ]


def _unread_dtypes(store: TensorStore, wanted: Iterable[str]) -> list[str]:
    return [
        f"dtype {store.dtype(name)} of {name} is not supported; convert to one of {', '.join(_DTYPES)}"
        for name in wanted
        if str(store.dtype(name)) not in _DTYPES
    ]


def _mixed_dtypes(layouts: LeafLayouts, store: TensorStore, names: set[str]) -> list[str]:
    """Returns the leaves whose tensors differ in dtype."""
    lines = []
    for leaf, layout in layouts.items():
        tensors = [part.tensor for part in layout.slices if part.tensor in names]
        dtypes = sorted({str(store.dtype(tensor)) for tensor in tensors})
        if len(dtypes) > 1:
            lines.append(f"the tensors of {leaf} ({tensors[0]} ...) are {' and '.join(dtypes)}; convert them to one")
    return lines
