"""From `Arch` back to a config: the file of a model that was rewritten, as a change of the file it had before."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from tracing_jax.arch.facts import Arch, UnsupportedModelError
from tracing_jax.arch.families import FAMILIES
from tracing_jax.arch.reading import read_arch


def change_config(folder: Path, arch: Arch) -> None:
    """Changes the `config.json` in `folder`, field by field, so that it describes a model with the facts `arch`.

    What need not change stays as it is, down to the names that older versions gave to fields.

    Raises:
      UnsupportedModelError: the config's family has no fields for these facts.
    """
    before = read_arch(folder)
    if before == arch:
        return
    file = folder / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    wanted, found = _fields(arch), _fields(before)
    changes = {name: value for name, value in wanted.items() if value != found[name]}
    names = FAMILIES[arch.family].names
    if changes.keys() & {names["embed_dim"], names["num_heads"]}:
        # A width of heads, and a number of kv heads, that are not in the file follow from what changes.
        changes |= {names[fact]: wanted[names[fact]] for fact in ("head_dim", "num_kv_heads") if fact in names}
    kinds_before = (before.layer_windows, before.layer_ropes)
    if (arch.layer_windows, arch.layer_ropes) != kinds_before and "layer_types" in FAMILIES[arch.family].uses.split():
        changes["layer_types"] = _layer_types(folder, before, arch)
    file.write_text(json.dumps(raw | changes, indent=2) + "\n", encoding="utf-8")
    written = read_arch(folder)
    if written != arch:
        wrong = [field.name for field in fields(arch) if getattr(written, field.name) != getattr(arch, field.name)]
        lines = [f"{name} {getattr(arch, name)}, which reads back as {getattr(written, name)}" for name in wrong]
        raise UnsupportedModelError(f"a config of family {arch.family} cannot say: {'; '.join(lines)}")


def can_say(arch: Arch, fact: str) -> bool:
    """Says whether a config of the model's family has a field for a fact, which else follows from others."""
    return fact in FAMILIES[arch.family].names


def _fields(arch: Arch) -> dict[str, Any]:
    """Returns the fields of a config that rewrites may change."""
    facts = {field.name: getattr(arch, field.name) for field in fields(arch)}
    facts["num_heads"] = arch.num_kv_heads * arch.q_group
    return {name: facts[fact] for fact, name in FAMILIES[arch.family].names.items()}


def _layer_types(folder: Path, before: Arch, after: Arch) -> list[str]:
    """Returns the type of each layer after, by the window and rope that layers of that type had before."""
    from transformers import AutoConfig

    types = AutoConfig.from_pretrained(folder, trust_remote_code=False).layer_types
    by_kind = dict(zip(zip(before.layer_windows, before.layer_ropes), types))
    kinds = list(zip(after.layer_windows, after.layer_ropes))
    if unknown := set(kinds) - by_kind.keys():
        raise UnsupportedModelError(f"{folder}: no layer type of this config has the windows and ropes {unknown}")
    return [by_kind[kind] for kind in kinds]
