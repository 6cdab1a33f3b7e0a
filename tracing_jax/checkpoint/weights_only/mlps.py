"""The MLPs of a layer, found by shapes: matrices between D features and F units, two or three of a kind.

Letters: D features, F units, E experts.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tracing_jax.checkpoint.weights_only.names import EXPERT, expert_pattern, module_of

Shape = tuple[int, ...]
Half = Literal["first", "second", "even", "odd"]

ATTENTION = re.compile(
    r"attn|attention|qkv|[qkv]_proj|o_proj|query|w_?pack|retention|rotary|temporal|rel_pos|ssm|mamba|conv|lora|cross"
)
"""Modules of a layer that are no MLPs, by their names."""

_ALL_EXPERTS = re.compile(r"(^|\.)experts\.(?!\{|\d)")
_OUT = re.compile(
    r"down|c_proj|(^|_)out|fc_?2|(^|\.)w2$|(^|\.)wo$|4h_to_h|lin(ear)?_?2|layer_2|value|_out$|output|\.2$"
)
_IN = re.compile(r"up|fc_?1|c_fc|(^|\.)w1$|(^|\.)wi|h_to_4h|intermediate|lin(ear)?_?1|layer_1|key|_in$|input|\.0$")
_GATE_FIRST = (("w1", "w3"), ("wi_0", "wi_1"), ("w1", "v1"), ("c_fc_0", "c_fc_1"), ("w2", "w1"), ("fc1_g", "fc1"))
"""Names of two matrices that read the features, where neither says which is the gate: the gate of published code."""


@dataclass(frozen=True)
class MatrixLocation:
    """A matrix of an MLP in every layer that has it.

    Attributes:
      rest: its name after the number of the layer, with `{expert}` for that of an expert.
      half: which half of its units it is, if two matrices are stored as one; `even` and `odd` where they alternate.
    """

    rest: str
    half: Half | None = None


@dataclass(frozen=True)
class Mlp:
    """An MLP of a layer, or one kind of its experts.

    Attributes:
      up, down: what reads the features and what writes them.
      gate: the second matrix that reads them.
      fused: gate and up as one tensor.
      units: F.
      experts: E; None for an MLP that every token passes.
      stacked: whether the experts of a layer are stacked in one tensor.
      how: how gate and up, or in and out, were distinguished.
      order_known: whether it is certain which of two readers is the gate.
    """

    down: MatrixLocation
    up: MatrixLocation | None
    gate: MatrixLocation | None
    fused: str | None
    units: int
    experts: int | None
    stacked: bool
    how: str
    order_known: bool = True

    @property
    def kind(self) -> tuple[object, ...]:
        """What is the same in all layers that have this MLP; their numbers of units may differ."""
        return self.down, self.up, self.gate, self.fused, self.experts

    @property
    def modules(self) -> str:
        """The names of its matrices, for a reader."""
        names = [matrix.rest for matrix in (self.gate, self.up) if matrix] or [str(self.fused)]
        return ", ".join([*names, self.down.rest])


@dataclass(frozen=True)
class _Candidate:
    rest: str
    shape: tuple[int, int]
    experts: int | None
    stacked: bool

    def other(self, width: int) -> int:
        """Returns the size of the axis that is not that of the features."""
        return self.shape[1] if self.shape[0] == width else self.shape[0]


def find_mlps(shapes: Mapping[str, Shape], width: int) -> list[Mlp]:
    """Returns the MLPs of a layer: each is all of what connects the features with its units.

    Args:
      shapes: the tensors of the layer, by their names after its number.
      width: D.
    """
    candidates, touched = _candidates(shapes, width)
    by_parent: dict[tuple[str, ...], list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_parent[_group(candidate)].append(candidate)
    found = [mlp for group in by_parent.values() for mlp in _in_group(group, width, touched)]
    if not found:  # the matrices may be in modules of their own, such as intermediate.dense and output.dense
        found = list(_in_group([c for c in candidates if not c.experts], width, touched))
    return found


def _group(candidate: _Candidate) -> tuple[str, ...]:
    module = module_of(candidate.rest)
    parent, _, name = module.rpartition(".")
    kind = re.search(r"_(shexp|exps|chexps)$", name)
    return parent, str(candidate.stacked), kind[1] if kind else ""


def _candidates(shapes: Mapping[str, Shape], width: int) -> tuple[list[_Candidate], dict[str, Shape]]:
    """Returns the matrices that may belong to an MLP, and all other tensors that are neither biases nor norms."""
    experts: dict[str, set[int]] = defaultdict(set)
    one: dict[str, Shape] = {}
    for rest, shape in shapes.items():
        pattern, number = expert_pattern(rest)
        one[pattern] = shape
        if number is not None:
            experts[pattern].add(number)
    candidates, others = [], {}
    for pattern, shape in one.items():
        count = len(experts[pattern]) if EXPERT in pattern else None
        stacked = len(shape) == 3 and min(shape) > 1 and EXPERT not in pattern
        matrix = shape[1:] if stacked else shape
        is_mlp = len(matrix) == 2 and width in matrix and not ATTENTION.search(pattern)
        if _ALL_EXPERTS.search(pattern) and not stacked:
            continue  # the experts of a layer one below the other: units cannot change places between them
        if is_mlp and not re.search(r"norm|bias$", pattern):
            candidates.append(_Candidate(pattern, (matrix[0], matrix[1]), shape[0] if stacked else count, stacked))
        elif not re.search(r"bias$|_b$", pattern) and (len(shape) > 1 or not re.search(r"norm|ln|scale", pattern)):
            others[pattern] = shape
    return candidates, others


def _in_group(group: Sequence[_Candidate], width: int, others: Mapping[str, Shape]) -> Iterator[Mlp]:
    by_units: dict[int, list[_Candidate]] = defaultdict(list)
    for candidate in group:
        by_units[candidate.other(width)].append(candidate)
    for units, members in sorted(by_units.items()):
        fused = by_units.get(2 * units, [])
        if units == width and not all(_IN.search(_name(c)) or _OUT.search(_name(c)) or _is_gate(c) for c in members):
            members = [c for c in members if c.stacked or _IN.search(_name(c)) or _OUT.search(_name(c)) or _is_gate(c)]
        if units < 4 or _are_touched(units, members[:1], others):
            continue
        if len(members) == 3:
            found = _gated(members, width, units)
        elif len(members) == 2:
            found = _ungated(members, width, units)
        elif len(members) == 1 and len(fused) == 1 and not _are_touched(2 * units, fused, others):
            down, how = members[0], f"{fused[0].rest} has twice as many units as {members[0].rest}"
            found = Mlp(MatrixLocation(down.rest), None, None, fused[0].rest, units, down.experts, down.stacked, how)
        else:
            continue
        if found is not None:
            yield found


def _are_touched(units: int, members: Sequence[_Candidate], others: Mapping[str, Shape]) -> bool:
    """Returns whether the module has tensors that mix or distinguish its units, as a mixer of tokens does."""
    parents = {module_of(c.rest).rpartition(".")[0] for c in members} - {""}
    return any(
        units in shape and any(module_of(rest).startswith(f"{parent}.") for parent in parents)
        for rest, shape in others.items()
    )


def _gated(members: Sequence[_Candidate], width: int, units: int) -> Mlp | None:
    if units == width:
        outs = [c for c in members if _OUT.search(_name(c)) and not _is_gate(c)]
    else:
        rows_are_features = [c.shape[0] == width for c in members]
        outs = [c for c, rows in zip(members, rows_are_features) if rows_are_features.count(rows) == 1]
        if not outs:  # all of one shape: names decide
            outs = [c for c in members if _OUT.search(_name(c))]
    if len(outs) != 1:
        return None
    down = outs[0]
    one, other = sorted((c for c in members if c is not down), key=_name)
    gates = [c for c in (one, other) if _is_gate(c)]
    how, known = "by the name of the gate", True
    if len(gates) == 1:
        gate = gates[0]
    else:
        names = {_name(c).rpartition(".")[2]: c for c in (one, other)}
        pair = next((pair for pair in _GATE_FIRST if set(pair) == set(names)), None)
        gate, known = (names[pair[0]], True) if pair else (one, False)
        how = f"by convention, {pair[0]} is the gate" if pair else "doubtful; which of the two is the gate is not known"
    up = other if gate is one else one
    return Mlp(
        MatrixLocation(down.rest),
        MatrixLocation(up.rest),
        MatrixLocation(gate.rest),
        None,
        units,
        down.experts,
        down.stacked,
        how,
        known,
    )


def _ungated(members: Sequence[_Candidate], width: int, units: int) -> Mlp | None:
    one, other = members
    outs = [c for c in members if _OUT.search(_name(c)) and not _IN.search(_name(c))]
    ins = [c for c in members if _IN.search(_name(c)) and not _OUT.search(_name(c))]
    how = "in and out by their names"
    if len(outs) == 1:
        down = outs[0]
    elif len(ins) == 1:
        down = other if ins[0] is one else one
    elif units != width and one.shape != other.shape:
        down, how = (one if one.shape[0] == width else other), "in and out by the usual order of the axes"
    else:
        return None
    up = other if down is one else one
    return Mlp(MatrixLocation(down.rest), MatrixLocation(up.rest), None, None, units, down.experts, down.stacked, how)


def _name(candidate: _Candidate) -> str:
    return module_of(candidate.rest).lower()


def _is_gate(candidate: _Candidate) -> bool:
    return "gate" in _name(candidate).rpartition(".")[2]
