"""`config.json` -> `Arch` and back; a config attribute that is unknown or not supported is an error."""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tracing_jax.arch.architecture import OTHERS, Arch, UnsupportedModelError
from tracing_jax.arch.attributes import (
    as_built,
    attribute_notes,
    attribute_problems,
    with_layer_overrides,
    without_undeclared,
)
from tracing_jax.arch.families import FAMILIES, SUPPORTED_FAMILIES
from tracing_jax.arch.family import ArchFields, ConfigFamily
from tracing_jax.arch.multimodal import (
    CAPPED,
    SUPPORTED_MULTIMODAL,
    family_of,
    is_multimodal,
    language_model,
    language_model_alone,
)
from tracing_jax.arch.rope import NO_ROPE, rope_is_absent, rope_notes, ropes, without_rope
from tracing_jax.error_messages import shortened

_MAX_COUNT = 10_000
"""Layers and experts of a model: ten times as many as any has."""

_MAX_SIZE = 1 << 24
"""Units of an axis: the largest vocabularies have a million."""

_MAX_LABELS = 100_000
"""Classes of a classifier; transformers makes a name for each."""

_MAX_HEADS = 4096
"""Heads of a layer, and dims of a head: several times as many as any model has. Leaves are read head by head."""

_COUNTS = re.compile(r"n_layers?|n_experts?|n_routed_experts|num_\w*(layers|experts)|\w+_layers")
_SIZES = re.compile(r"n_(embd|inner|ctx)|d_(model|ff|kv)|\w+_(size|dim|rank)")

_HEADS = re.compile(r"n_head(_kv)?|\w*(heads|head_dim)")

_EPSILON = re.compile(r"(^|_|norm)eps(ilon)?(_|$)")

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


_RENAMED = {"kimi_k2": "deepseek_v3", "mimo": "qwen2"}
"""Model type that transformers does not have -> the one whose model it is."""


_NEGATIVE = "the epsilon of norms is {}; expected 0 or more"


def read_arch(folder: Path) -> Arch:
    """Returns the architecture of the model whose `config.json` is in `folder`; no weight is read.

    Raises:
      UnsupportedModelError: the file is absent or not JSON, the architecture is unknown, or an attribute that may
        change numbers is; all findings are named at once, with what is supported.
    """
    return read_arch_and_notes(folder)[0]


def read_arch_and_notes(folder: Path) -> tuple[Arch, list[str]]:
    """Returns what `read_arch` does, and notes on what else is in the config.

    Raises:
      UnsupportedModelError: as `read_arch`.
    """
    file = folder / "config.json"
    if problem := _raw_problem(read_raw_config(folder)):
        raise UnsupportedModelError(f"{file}: {problem}")
    try:
        config = _hf_config(folder)
        arch, text = arch_from_config(config), language_model(config)
        family = family_of(text.model_type)
        assert family is not None
        inside = [f"of this {config.model_type} model the language model is read"] if text is not config else []
        notes = attribute_notes(text, family) + rope_notes(text, family.partial_rotary)
        return arch, inside + notes
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file}: {error}") from error
    except Exception as error:  # transformers reports a bad field by whatever its validators raise
        raise UnsupportedModelError(f"{file}: transformers refuses this config: {error}") from error


def _hf_config(folder: Path) -> Any:
    """Returns the config in a folder as transformers reads it."""
    from transformers import CONFIG_MAPPING, AutoConfig  # slow to import, and not needed by those who make an Arch

    raw = read_raw_config(folder)
    if (family := _RENAMED.get(str(raw.get("model_type")))) is None:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return CONFIG_MAPPING[family].from_dict({name: value for name, value in raw.items() if name != "model_type"})


def read_raw_config(folder: Path) -> dict[str, Any]:
    """Returns the content of the `config.json` in `folder`, as it was written.

    Raises:
      UnsupportedModelError: there is none, or it is no JSON object.
    """
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnsupportedModelError(f"{folder} has no config.json") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{file}: not a readable config ({error})") from error
    if not isinstance(raw, dict):
        raise UnsupportedModelError(f"{file}: expected a JSON object, found a {type(raw).__name__}")
    return raw


def negative_epsilon(raw: Mapping[str, Any]) -> str | None:
    """Returns that a config has norms with a negative epsilon, which no program writes; None if it has none.

    It can take features out of a norm, whatever is in them, so that such a model is not even read by its weights alone.
    """
    for name, value in raw.items():
        if isinstance(value, Mapping):
            if (problem := negative_epsilon(value)) is not None:
                return problem
        elif _EPSILON.search(name):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and number < 0:
                    return _NEGATIVE.format(number)
    return None


def _raw_problem(raw: dict[str, Any]) -> str | None:
    """Returns the problems of a config before transformers builds anything from it."""
    model_type = _RENAMED.get(str(raw.get("model_type")), raw.get("model_type"))
    if not isinstance(model_type, str) or not (model_type in FAMILIES or is_multimodal(model_type)):
        return _not_supported(model_type)
    if problem := _size_problem(raw):
        return problem
    if is_multimodal(model_type):
        return None  # configs inside of others lack what is at its default
    if isinstance(raw.get("text_config"), dict):
        return (
            f"text_config holds the config of another model, and transformers reads none of it in a {model_type}; the "
            "model_type must be that of the whole, such as mistral3 for a ministral3 with a vision tower"
        )
    if raw.get("configuration_files"):
        return "configuration_files has transformers read another file; remove it, or make that file config.json"
    family = FAMILIES[model_type]
    return None if family.optional_theta else rope_is_absent(raw, family.thetas)


def _not_supported(model_type: Any) -> str:
    return (
        f"architecture {shortened(repr(model_type))} is not supported{OTHERS}{', '.join(SUPPORTED_FAMILIES)}; "
        f"and the language models of {', '.join(SUPPORTED_MULTIMODAL)}"
    )


def arch_from_config(config: Any) -> Arch:
    """Returns the architecture of a model from its `transformers` config object.

    Raises:
      UnsupportedModelError: names every attribute that is unknown or asks for something not computed here.
    """
    whole, config = config, language_model(config)
    is_inside = whole is not config
    family = family_of(config.model_type)
    if family is None:
        raise UnsupportedModelError(_not_supported(config.model_type))
    problems = attribute_problems(config, family)
    config = with_layer_overrides(config)
    if problems := problems + _problems(config, family):
        raise UnsupportedModelError("; ".join(problems))
    config = without_undeclared(as_built(config), family)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, family.names.get("num_kv_heads", ""), None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = ropes(config, head_dim, partial=family.partial_rotary) if family.thetas else NO_ROPE
    found: ArchFields = (without_rope(rope, family.rope_layers(config)) if family.rope_layers else rope) | {
        "mlp_dim": getattr(config, "intermediate_size", None),
        "norm_eps": getattr(config, "rms_norm_eps", None),
        "attention_scale": head_dim**-0.5,
        "num_layers": layers,
        "layer_windows": (None,) * layers,
        "head_dim": head_dim,
        "num_kv_heads": kv_heads,
        "q_group": heads // kv_heads,
    }
    if family.activation:
        found["activation"] = _ACTIVATIONS[getattr(config, family.activation)]
    arch = Arch(
        family=family.same_as or config.model_type,
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        tied=bool(config.tie_word_embeddings),
        **(found | family.read(config)),
    )
    if not arch.norm_eps >= 0:
        raise UnsupportedModelError(_NEGATIVE.format(arch.norm_eps))
    if is_inside and (arch.logit_scale, arch.logit_softcap) != (1.0, None) and whole.model_type not in CAPPED:
        # Other classes in transformers have a head without these, other programs may not.
        raise UnsupportedModelError(f"logits that are scaled or capped in a {whole.model_type} model are not supported")
    return arch


def _problems(config: Any, family: ConfigFamily) -> list[str]:
    lines = []
    heads, own_name = config.num_attention_heads, family.names.get("num_kv_heads", "")
    kv_heads = getattr(config, own_name, None)
    if kv_heads and heads % kv_heads:
        lines.append(f"num_attention_heads {heads} is not a multiple of {own_name} {kv_heads}")
    if family.activation and (activation := getattr(config, family.activation)) not in _ACTIVATIONS:
        lines.append(f"activation {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    if getattr(config, "use_bidirectional_attention", None) and "use_bidirectional_attention" in family.used:
        lines.append("use_bidirectional_attention is set; only causal models are supported")
    return lines


def change_config(folder: Path, arch: Arch) -> None:
    """Changes the `config.json` in `folder`, field by field, so that it describes a model with the architecture `arch`.

    What need not change stays as it is, down to the names that older versions gave to fields; of a multimodal model's
    config only that of the language model is kept.

    Raises:
      UnsupportedModelError: the config's family has no fields for this architecture.
    """
    _keep_language_model(folder)
    before = read_arch(folder)
    if not arch.has_head:  # a config says nothing of that, and ties what is not there or not
        arch = replace(arch, has_head=True, tied=before.tied)
    if before == arch:
        return
    file = folder / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    wanted, found = _fields(arch), _fields(before)
    changes = {name: value for name, value in wanted.items() if value != found[name]}
    names = FAMILIES[arch.family].names
    if changes.keys() & {names["embed_dim"], names["num_heads"]}:
        # A width of heads, and a number of kv heads, that are not in the file follow from what changes.
        changes |= {names[field]: wanted[names[field]] for field in ("head_dim", "num_kv_heads") if field in names}
    if _layer_kinds(arch) != _layer_kinds(before):
        changes |= _per_layer(folder, before, arch)
    layer_fields = FAMILIES[arch.family].layer_fields
    if layer_fields and (arch.num_layers, arch.layer_experts) != (before.num_layers, before.layer_experts):
        changes |= layer_fields(arch)
    file.write_text(json.dumps(raw | changes, indent=2) + "\n", encoding="utf-8")
    written = read_arch(folder)
    if written != arch:
        wrong = [field.name for field in fields(arch) if getattr(written, field.name) != getattr(arch, field.name)]
        lines = [f"{name} {getattr(arch, name)}, which reads back as {getattr(written, name)}" for name in wrong]
        raise UnsupportedModelError(f"a config of family {arch.family} has no fields for: {'; '.join(lines)}")


def _keep_language_model(folder: Path) -> None:
    from transformers import AutoConfig

    if is_multimodal(read_raw_config(folder).get("model_type")):
        raw = language_model_alone(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def has_field(arch: Arch, name: str) -> bool:
    """Returns whether a config of the model's family has a field for this attribute of `Arch`.

    A model of which only the weights are understood is held to no config.
    """
    return arch.family not in FAMILIES or name in FAMILIES[arch.family].names


def _fields(arch: Arch) -> dict[str, Any]:
    """Returns the fields of a config that rewrites may change."""
    values = {field.name: getattr(arch, field.name) for field in fields(arch)}
    values["num_heads"] = arch.num_kv_heads * arch.q_group
    dense = [arch.mlp_dim_of(i) for i in range(arch.num_layers) if not arch.has_experts(i)]
    values["dense_mlp_dim"] = dense[0] if dense else arch.shared_mlp_dim if arch.branch_norms else None
    return {name: values[field] for field, name in FAMILIES[arch.family].names.items()}


def _layer_kinds(arch: Arch) -> list[tuple[Any, ...]]:
    """Returns for each layer its window, its rope and what mixes its tokens."""
    return list(itertools.zip_longest(arch.layer_windows, arch.layer_ropes, arch.layer_mixers))


def _per_layer(folder: Path, before: Arch, after: Arch) -> dict[str, list[Any]]:
    """Returns attributes such as the types of layers after, by the windows, ropes and mixers of such layers before."""
    family, config = FAMILIES[after.family], _hf_config(folder)
    kinds_before, kinds = map(_layer_kinds, (before, after))
    changes = {}
    for name in (name for name in family.per_layer if name in family.uses.split()):
        by_kind = dict(zip(kinds_before, getattr(config, name)))
        if unknown := set(kinds) - by_kind.keys():
            raise UnsupportedModelError(
                f"{folder}: no {name} of this config has the windows, ropes and mixers {unknown}"
            )
        changes[name] = [by_kind[kind] for kind in kinds]
    return changes


def _size_problem(raw: Mapping[str, Any]) -> str | None:
    """Returns which size of a config, or of a config inside it, is out of all proportion; None if none is."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            if problem := _size_problem({key: inner for key, inner in value.items() if not isinstance(inner, Mapping)}):
                return f"{name}: {problem}"
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = _most_of(name)
            if most is not None and not 0 <= value <= most:
                return f"{name} is {value!r:.40}, expected at most {most}; no model has such a size"
    return None


def _most_of(name: str) -> int | None:
    if name == "num_labels":
        return _MAX_LABELS
    bounds = ((_COUNTS, _MAX_COUNT), (_HEADS, _MAX_HEADS), (_SIZES, _MAX_SIZE))
    return next((most for names, most in bounds if names.fullmatch(name)), None)
