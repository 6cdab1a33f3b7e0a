"""What was found in a model that is read by its weights alone; a file in YAML can say it otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.weights_only.mlps import Half
from tracing_jax.checkpoint.weights_only.norms import Norm
from tracing_jax.error_messages import shortened

LAYOUT_KEYS = ("embedding", "head", "final_norm", "mlp_norm", "mlp_post_norm", "gate", "up", "down")
"""The parts of a model that tests compare, by the names that a file of a layout gives them."""

UNITS = ("gate", "up", "down")


@dataclass(frozen=True)
class TensorLocation:
    """Where a part is stored.

    Attributes:
      tensor: the name of its tensor, with `{layer}` for the number of a layer and `{expert}` for that of an expert.
      half: which half of the units of that tensor, if it holds two matrices.
      how: how it was found.
    """

    tensor: str
    half: Half | None = None
    how: str = "by name and shape"

    def __str__(self) -> str:
        return self.tensor + (
            f" ({self.half} {'rows' if self.half in ('even', 'odd') else 'half'})" if self.half else ""
        )


@dataclass(frozen=True)
class Matrix:
    """Another matrix with the features on one axis.

    Attributes:
      tensor: its name.
      position: of the layer that it is counted to, among those that have an MLP.
      axis: of the features.
    """

    tensor: str
    position: int
    axis: int


@dataclass(frozen=True)
class Description:
    """Everything that was found.

    Attributes:
      width: number of features.
      layers: the numbers of the layers that are read.
      parts: name, one of `LAYOUT_KEYS` -> where it is stored.
      matrices: other matrices with the features on one axis.
      norm: what the norms compute; None if that is not known.
      tied: whether the head is the embedding.
      in_out: whether square matrices are stored `[in, out]`.
      unknown: what could not be found out -> why.
      notes: remarks for the reader.
    """

    width: int
    layers: Sequence[int]
    parts: Mapping[str, TensorLocation]
    matrices: Sequence[Matrix] = ()
    norm: Norm | None = None
    tied: bool = False
    in_out: bool = False
    unknown: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Returns what was found, one line for each part."""
        layers = f"layers {_ranges(self.layers)}, {self.width} features" if self.layers else "no layers"
        found = [f"{name} = {part} [{part.how}]" for name, part in self.parts.items()]
        found.append(f"norms = {self.norm or 'unknown'}")
        if self.tied:
            found.append("head = the embedding")
        if self.matrices:
            found.append(f"{len(self.matrices)} other matrices, for features in place alone")
        return [f"{layers}; {'; '.join(found)}", *(f"{fact}: {why}" for fact, why in self.unknown.items()), *self.notes]

    def as_yaml(self) -> str:
        """Returns the parts in the form of a layout file."""
        lines = []
        for name in LAYOUT_KEYS:
            part = self.parts.get(name)
            if part is None:
                lines.append(f"# {name}: not found")
            elif part.half:
                lines.append(f"{name}: {{tensor: {part.tensor!r}, half: {part.half}}}  # {part.how}")
            else:
                lines.append(f"{name}: {part.tensor!r}  # {part.how}")
        lines.append(f"norm: {self.norm}" if self.norm else f"# norm: {self.unknown.get('norm', 'unknown')}")
        return "\n".join([*lines, f"tied: {str(self.tied).lower()}", ""])


def with_layout(found: Description, path: Path) -> Description:
    """Returns the description with what a layout file says in place of what was found.

    Raises:
      CheckpointError: the file cannot be read, or says what cannot be.
    """
    import yaml

    try:
        layout = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: no readable layout ({shortened(error)})") from error
    if not isinstance(layout, dict):
        raise CheckpointError(f"{path}: expected names of parts with their tensors, found a {type(layout).__name__}")
    known = (*LAYOUT_KEYS, "norm", "tied")
    if unknown := sorted(str(name) for name in layout if name not in known):
        raise CheckpointError(f"{path}: {', '.join(unknown)}: no such parts; there are {', '.join(known)}")
    parts, facts = dict(found.parts), dict(found.unknown)
    for name in (name for name in LAYOUT_KEYS if name in layout):
        parts.pop(name, None)
        if layout[name] not in (None, "none"):
            parts[name] = _part(layout[name], name, path)
    if set(UNITS) & set(layout):
        facts.pop("units", None)
    norm = layout.get("norm", found.norm)
    if norm not in (None, "unknown", *get_args(Norm)):
        raise CheckpointError(f"{path}: norm: expected unknown, {', '.join(get_args(Norm))}, found {shortened(norm)}")
    if "norm" in layout:
        facts.pop("norm", None)
        if norm in (None, "unknown"):
            facts["norm"], norm = f"{path.name} says so", None
    return replace(found, parts=parts, norm=norm, tied=bool(layout.get("tied", found.tied)), unknown=facts)


def _part(value: Any, name: str, path: Path) -> TensorLocation:
    how = f"as {path.name} says"
    if isinstance(value, str):
        return TensorLocation(value, how=how)
    if isinstance(value, dict) and isinstance(value.get("tensor"), str) and set(value) <= {"tensor", "half"}:
        half = value.get("half")
        if half in (None, *get_args(Half)):
            return TensorLocation(value["tensor"], half, how)
    raise CheckpointError(
        f"{path}: {name}: expected the name of a tensor, or tensor and half ({', '.join(get_args(Half))}), found "
        f"{shortened(value)}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    more = f" and {len(numbers) - 12} more" if len(numbers) > 12 else ""
    return ", ".join(map(str, numbers[:12])) + more
