"""The tensors of a GGUF file under the names and in the layout of transformers: the inverse of llama.cpp's conversion.

llama.cpp renames tensors, stacks the experts of a layer, and for some families changes what a tensor holds: the rows of
queries and keys of Llama go from halves (those rotated by cosines first) to pairs, queries, keys and values that share
a tensor from one kv head after another to all of a kind together, Gemma's gains are stored plus one, GPT-2's linear
weights transposed, and gate and up of experts apart. Source: llama.cpp's convert_hf_to_gguf.py.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map

from tracing_jax.arch import Arch
from tracing_jax.checkpoint.derived_tensors import Derived, DerivedTensors
from tracing_jax.checkpoint.gguf.recurrences import QWEN_HYBRIDS, of_delta_net, of_mamba
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.name_patterns import layer_number
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.checkpoint.tensors import TensorStore

RowOrder = Callable[[np.ndarray], np.ndarray]
"""Rows of ours -> their places in a file."""

_IN_PAIRS = ("llama", "granite", "granitemoe", "nemotron_h", "nemotron_h_moe", "olmo", "smollm3")
"""Families whose queries and keys are stored in pairs."""

_PLUS_ONE = ("gemma", "gemma2", "gemma3", *QWEN_HYBRIDS)
"""Families whose gains are stored plus one; those of the norms in recurrences are not."""

_FROM_HEADS = ("gptneox", "falcon", "bloom")
"""Families whose queries, keys and values are in one tensor, here kind after kind, there head after head."""

_EXPERT = re.compile(r"(?P<before>.*\.experts)\.(?P<number>\d+)(?P<after>\..*)")
_NORM_OF_HEAD = re.compile(r"(?P<before>.*)\.norms\.(?P<number>\d+)(?P<after>\..*)")
_FUSED = re.compile(r".*\.experts\.gate_up_proj(?P<bias>_bias)?")
_GPT2_LINEAR = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
_SCALES = re.compile(r".*\.layers\.(?P<layer>\d+)\.router\.(?P<part>scale|per_expert_scale)")  # of Gemma 4
_USED_ELSEWHERE = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def with_hf_names(store: TensorStore, architecture: str, arch: Arch) -> TensorStore:
    """Returns the tensors of a model as transformers stores them; those without a counterpart keep their names.

    Args:
      store: the tensors of the file.
      architecture: the name of the family in llama.cpp.
      arch: the facts of the model, from the metadata of the file.
    """
    known = set(store.names())
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    blocks = max((layer_number(name) + 1 for name in known), default=0)  # of Nemotron-H more than layers
    table = get_tensor_name_map(numbers[architecture], max(arch.num_layers, blocks))
    derived: dict[str, Derived] = {}
    used = set(_USED_ELSEWHERE)
    for name, shape in tensor_shapes(leaf_layouts(arch).values()).items():
        if fused := _FUSED.fullmatch(name):
            end = _suffix(fused["bias"])
            gate, up = (f"blk.{layer_number(name)}.ffn_{part}_exps.{end}" for part in ("gate", "up"))
            if known.issuperset((gate, up)):
                in_turn = arch.clamped_glu is not None
                is_bias = fused["bias"] is not None
                derived[name] = _InTurn(store, gate, up, is_bias) if in_turn else _Joined(store, gate, up)
                used |= {gate, up}
                continue
        gate_and_up = tuple(f"blk.{layer_number(name)}.ffn_{part}_exps.weight" for part in ("gate", "up"))
        if name.endswith(".block_sparse_moe.input_linear.weight") and known.issuperset(gate_and_up):
            derived[name] = _Joined(store, *gate_and_up)
            used |= set(gate_and_up)
            continue
        halves = tuple(f"blk.{layer_number(name)}.attn_{part}_b.weight" for part in ("k", "v"))
        if name.endswith(".kv_b_proj.weight") and known.issuperset(halves):
            derived[name] = _KeysAndValues(store, *halves)
            used |= set(halves)
            continue
        rebuilt = of_delta_net(name, shape, architecture, arch, store, known) or of_mamba(
            name, shape, arch, store, known
        )
        if rebuilt is not None:
            derived[name] = rebuilt
            used |= set(rebuilt.names)
            continue
        row = _EXPERT.fullmatch(name) or _NORM_OF_HEAD.fullmatch(name)
        theirs = _their_name(f"{row['before']}{row['after']}" if row else name, table)
        if theirs in known:
            is_row = shape[:1] == (1,) and store.shape(theirs) == shape[1:]
            number = int(row["number"]) if row else None
            derived[name] = _Converted(store, theirs, number, *_conversion(name, architecture, arch), is_row)
            used.add(theirs)
    return DerivedTensors(store, derived, used)


def _their_name(name: str, table: TensorNameMap) -> str | None:
    """Returns the name that llama.cpp gives to a tensor; None if it has none for it."""
    name = re.sub(r"\.experts\.down_proj(_bias)?$", lambda m: f".experts.down_proj.{_suffix(m[1])}", name)
    name = re.sub(r"^backbone\.(layers\.\d+)\.mixer\.experts\.", r"model.\1.mlp.experts.", name)
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    name = re.sub(r"\.experts\.gate_up_proj$", ".experts.gate_up_proj.weight", name)
    name = f"{name}.weight" if name.endswith((".sinks", ".layer_scalar")) else name
    if scale := _SCALES.fullmatch(name):
        return f"blk.{scale['layer']}.{'ffn_gate_inp' if scale['part'] == 'scale' else 'ffn_down_exps'}.scale"
    forms = (name, name.removeprefix("transformer."))  # BLOOM's converter leaves the prefix out
    return next(filter(None, (table.get_name(form, try_suffixes=(".weight", ".bias")) for form in forms)), None)


def _suffix(bias: str | None) -> str:
    return "bias" if bias else "weight"


def _conversion(name: str, architecture: str, arch: Arch) -> tuple[RowOrder | None, bool, bool]:
    """Returns the fields of `_Converted` from `rows` to `transposed` for a tensor of transformers."""
    rows: RowOrder | None = None
    if architecture in _IN_PAIRS:
        queries, keys = arch.num_kv_heads * arch.q_group, arch.num_kv_heads
        heads = next((count for part, count in ((".q_proj.", queries), (".k_proj.", keys)) if part in name), None)
        rows = None if heads is None else functools.partial(_from_pairs, arch.head_dim)
    if architecture in _FROM_HEADS and "query_key_value" in name:
        rows = functools.partial(_from_kinds, arch)
    minus_one = architecture in _PLUS_ONE and name.endswith("norm.weight")
    is_linear = architecture == "gpt2" and _GPT2_LINEAR.fullmatch(name) is not None
    is_down = architecture == "gpt-oss" and name.endswith(".experts.down_proj")
    return rows, minus_one, is_linear or is_down


def _from_pairs(width: int, rows: np.ndarray) -> np.ndarray:
    """Returns the places of rows in a tensor that has those of each head in pairs, where ours have them in halves."""
    half, place = np.divmod(rows % width, width // 2)
    return rows - rows % width + 2 * place + half


def _from_kinds(arch: Arch, rows: np.ndarray) -> np.ndarray:
    """Returns the places of rows in a tensor with all queries, all keys and all values, where ours go by kv head."""
    width, group, kv_heads = arch.head_dim, arch.q_group, arch.num_kv_heads
    head, within = np.divmod(rows, (group + 2) * width)
    kind = np.maximum(within // width - group + 1, 0)  # 0 queries, 1 keys, 2 values
    queries = head * group * width + within
    others = (kv_heads * (group + kind - 1) + head) * width + within % width
    return np.where(kind == 0, queries, others)


@dataclass(frozen=True)
class _Converted:
    """A tensor of a file, as transformers stores it.

    Attributes:
      store: the tensors of the file.
      name: of the tensor there.
      number: which of the stacked experts, or heads, it is.
      rows: the places of our rows there, where they are in another order.
      minus_one: whether it is stored plus one.
      transposed: whether its last two axes are exchanged.
      is_row: whether it is a matrix of one row, stored as a vector, as versions of llama.cpp's conversion did.
    """

    store: TensorStore
    name: str
    number: int | None = None
    rows: RowOrder | None = None
    minus_one: bool = False
    transposed: bool = False
    is_row: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.store.shape(self.name)
        if self.is_row:
            return (1, *shape)
        shape = shape if self.number is None else shape[1:]
        return (*shape[:-2], *shape[-1:-3:-1]) if self.transposed else shape

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype(self.name)

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = bounds_of(index, self.shape)
        if self.is_row:
            return self.store.read(self.name, bounds[1:])[None][bounds[0]]
        if self.transposed:
            *first, rows, columns = bounds
            found = self.store.read(self.name, (*first, columns, rows))
            return np.ascontiguousarray(found.swapaxes(-1, -2))
        if self.rows is not None:
            return self._in_our_order(self.rows, bounds)
        if self.number is not None:
            return self.store.read(self.name, (slice(self.number, self.number + 1), *bounds))[0]
        found = self.store.read(self.name, bounds)
        return (found.astype(np.float32) - 1).astype(self.dtype) if self.minus_one else found

    def _in_our_order(self, order: RowOrder, bounds: Index) -> np.ndarray:
        """Returns rows of the tensor in our order, read from a file that has them in another."""
        rows = np.arange(bounds[0].start, bounds[0].stop)
        if not len(rows):
            return self.store.read(self.name, bounds)
        stored = order(rows)
        first = int(stored.min())
        return self.store.read(self.name, (slice(first, int(stored.max()) + 1), *bounds[1:]))[stored - first]


@dataclass(frozen=True)
class _InTurn:
    """Gate and up of all experts in turn, `[E, D, 2F]` or as biases `[E, 2F]`; a file has each apart, `[E, F, D]`."""

    store: TensorStore
    gate: str
    up: str
    is_bias: bool

    @property
    def shape(self) -> tuple[int, ...]:
        experts, units, *ins = self.store.shape(self.gate)
        return (experts, *ins, 2 * units)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype(self.gate)

    def read(self, index: Index = ()) -> np.ndarray:
        experts, *ins, columns = bounds_of(index, self.shape)
        units = slice(columns.start // 2, -(-columns.stop // 2))
        both = np.stack([self.store.read(name, (experts, units, *ins)) for name in (self.gate, self.up)], axis=2)
        turned = both.reshape(both.shape[0], -1, *both.shape[3:])  # units of gate and up in turn
        start = columns.start - 2 * units.start
        found = turned[:, start : start + columns.stop - columns.start]
        return np.ascontiguousarray(found if self.is_bias else found.swapaxes(-1, -2))


@dataclass(frozen=True)
class _KeysAndValues:
    """Keys and values of a latent, `[heads * (N + V), rank]`, head after head.

    A file has them apart, the keys transposed: `[heads, rank, N]` and `[heads, V, rank]`.
    """

    store: TensorStore
    keys: str
    values: str

    @property
    def shape(self) -> tuple[int, ...]:
        heads, rank, keys = self.store.shape(self.keys)
        return heads * (keys + self.store.shape(self.values)[1]), rank

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype(self.keys)

    def read(self, index: Index = ()) -> np.ndarray:
        rows, columns = bounds_of(index, self.shape)
        width = self.shape[0] // self.store.shape(self.keys)[0]
        heads = slice(rows.start // width, -(-rows.stop // width))
        keys = self.store.read(self.keys, (heads, columns, slice(None))).swapaxes(1, 2)
        values = self.store.read(self.values, (heads, slice(None), columns))
        both = np.concatenate([keys, values.astype(keys.dtype)], axis=1)
        start = rows.start - heads.start * width
        return both.reshape(both.shape[0] * width, both.shape[2])[start : start + rows.stop - rows.start]


@dataclass(frozen=True)
class _Joined:
    """Gate and up of all experts, one after the other, `[E, 2F, D]`, which a file has apart."""

    store: TensorStore
    gate: str
    up: str

    @property
    def shape(self) -> tuple[int, ...]:
        experts, units, ins = self.store.shape(self.gate)
        return experts, 2 * units, ins

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype(self.gate)

    def read(self, index: Index = ()) -> np.ndarray:
        experts, rows, columns = bounds_of(index, self.shape)
        units = self.shape[1] // 2
        parts = []
        for name, first in ((self.gate, 0), (self.up, units)):
            span = slice(*(min(max(bound - first, 0), units) for bound in (rows.start, rows.stop)))
            parts.append(self.store.read(name, (experts, span, columns)))
        return np.concatenate(parts, axis=1)
