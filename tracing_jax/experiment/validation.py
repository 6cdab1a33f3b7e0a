"""The config of a run: what can be checked before anything is read."""

from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tracing_jax import demo
from tracing_jax.alignment import beyond_permutations, kind_problems, kinds_in
from tracing_jax.axes import PERMUTABLE
from tracing_jax.experiment.memory import MEMORY
from tracing_jax.record import RunFiles, check_writable
from tracing_jax.rewrites import Renaming, rewrite_names
from tracing_jax.statistics import COSTLY, LIGHT, REGISTRY
from tracing_jax.statistics.match import FORMS
from tracing_jax.statistics.verdict import UNDECIDED_BELOW

DEMO = "demo:"
"""What stands before the name of a member of the demo family, in place of a folder or Hub id."""

RENAMING = Renaming.name
"""The rewrite that a run cannot draw: its tokenizers are those of the files."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Names of the computing dtypes."""


class ConfigError(ValueError):
    """The config of a run asks for something that does not exist or does not fit; all findings at once."""


def check_config(config: ConfigDict) -> None:
    """Checks every field that can be checked without reading a model.

    Raises:
      ConfigError: all findings, one line each.
    """
    lines = _model_problems(config) + _choice_problems(config) + _number_problems(config) + _save_problems(config)
    if lines:
        raise ConfigError("\n  ".join(["the config cannot run:", *lines]) if len(lines) > 1 else lines[0])


def _model_problems(config: ConfigDict) -> list[str]:
    asked = {"base_model_id": config.base_model_id}
    if "ft_model_ids" not in config:
        asked["ft_model_id"] = config.ft_model_id
    elif config.get("ft_model_id"):
        return [f"both ft_model_id={config.ft_model_id} and ft_model_ids={config.ft_model_ids} are set; leave one out"]
    else:
        asked |= {f"ft_model_ids[{i}]": model_id for i, model_id in enumerate(config.ft_model_ids)}
    lines = []
    for name, model_id in asked.items():
        if not model_id:
            lines.append(f"{name} is not set: a local folder, a Hub id, or demo:<{'|'.join(demo.MEMBERS)}>")
        elif model_id.startswith(DEMO) and not demo.is_member(model_id.removeprefix(DEMO)):
            lines.append(f"{name}={model_id}: the demo has {', '.join((*demo.MEMBERS, *demo.TREE))}")
    return lines


def _choice_problems(config: ConfigDict) -> list[str]:
    lines = []
    if not names_in(config.stat):
        lines.append(f"no statistic is asked for; there are {', '.join(REGISTRY)}, or all")
    if unknown := [name for name in names_in(config.stat) if name not in REGISTRY]:
        lines.append(f"unknown statistic {', '.join(unknown)}; there are {', '.join(REGISTRY)}, or all")
    axes = names_in(config.permute_axes)
    if unknown := [axis for axis in axes if axis not in PERMUTABLE]:
        lines.append(f"permute_axes: unknown axes {', '.join(unknown)}; there are {', '.join(PERMUTABLE)}")
    if config.permute and not axes:
        lines.append(f"permute is set and permute_axes is empty; choose from {', '.join(PERMUTABLE)}")
    lines += _align_problems(config)
    lines += _disguise_problems(config.disguise)
    if config.align_evidence not in ("weights", "activations"):
        lines.append(f"align_evidence={config.align_evidence}: it is weights or activations")
    if config.csh_activation not in ("hidden", "up"):
        lines.append(f"csh_activation={config.csh_activation}: it is hidden or up")
    if not names_in(config.match_forms) or set(names_in(config.match_forms)) - set(FORMS):
        lines.append(f"match_forms={config.match_forms!r}: one or both of {', '.join(FORMS)}")
    if config.memory not in MEMORY:
        lines.append(f"memory={config.memory}: it is one of {', '.join(MEMORY)}")
    if config.memory == "stream" and config.align and (beyond := beyond_permutations(kinds_in(config.align_axes))):
        lines.append(
            f"align_axes={config.align_axes}: {', '.join(beyond)} need both models in memory; set memory=resident, or "
            f"choose from {', '.join(PERMUTABLE)}"
        )
    if config.save_aligned and not config.align:
        lines.append(f"save_aligned={config.save_aligned}: nothing is aligned; set align")
    if config.save_aligned and jax.process_count() > 1:
        lines.append(f"save_aligned={config.save_aligned}: one process alone can write a checkpoint; start only one")
    if config.save_aligned and Path(config.save_aligned).expanduser().exists():
        lines.append(f"save_aligned={config.save_aligned}: it is there already; remove it or choose another folder")
    if config.max_layers and config.disguise:
        lines.append("max_layers looks at the first layers as they are; leave disguise out, or trace the whole model")
    if config.dtype not in DTYPES:
        lines.append(f"dtype={config.dtype}: it is one of {', '.join(DTYPES)}")
    if not (config.dataset or config.dataset_id):
        lines.append("neither dataset nor dataset_id is set: a name such as wikitext, a local file, or a Hub id")
    return lines


def _align_problems(config: ConfigDict) -> list[str]:
    kinds = kinds_in(config.align_axes)
    lines = [f"align_axes={config.align_axes}: {line}" for line in kind_problems(kinds) if kinds or config.align]
    if config.align_evidence == "activations" and (beyond := beyond_permutations(kinds)):
        lines.append(
            f"align_axes={config.align_axes}: {', '.join(beyond)} are estimated from weights alone; "
            "set align_evidence=weights"
        )
    return lines


def _disguise_problems(listed: str) -> list[str]:
    try:
        names = rewrite_names(listed)
    except ValueError as error:
        return [f"disguise={listed}: {error}"]
    if RENAMING not in names or listed.strip() == "all":  # of which a run takes the others
        return []
    return [
        f"disguise={listed}: {RENAMING} changes the tokenizer's files too; write a checkpoint with "
        f"`python -m tracing_jax.rewrites --disguise={listed} ...` and trace that"
    ]


def _number_problems(config: ConfigDict) -> list[str]:
    lines = []
    if outside := [alpha for alpha in config.alphas if not (isinstance(alpha, int | float) and 0 <= alpha <= 1)]:
        lines.append(f"alphas {outside} are no numbers in 0..1")
    for name, least in (("block_size", 2), ("batch_size", 1), ("num_tokens", config.block_size), ("emb_max_rows", 1)):
        if config[name] < least:
            lines.append(f"{name}={config[name]}: at least {least}")
    least_copies = 1 if {"perm_mode_l2", "all"} & {*str(config.stat).split(",")} else 0  # l2 is a distance without them
    least_counts = {"max_layers": 0, "mode_num_perm": 0, "num_perm": least_copies, "csh_blocks": 1, "csh_block_size": 2}
    least_counts |= {"distil_tokens": 32, "distil_steps": 1, "distil_batch": 1, "distil_units": 0}
    lines += [
        f"{name}={config[name]}: at least {least}" for name, least in least_counts.items() if config[name] < least
    ]
    if not config.distil_rate > 0 or not 0 <= config.distil_decay < 1:
        lines.append(
            f"distil_rate={config.distil_rate}, distil_decay={config.distil_decay}: the rate is above 0, and the decay "
            "at least 0 and below 1"
        )
    if not 0 < config.level <= UNDECIDED_BELOW:
        lines.append(f"level={config.level}: it lies above 0 and at most at {UNDECIDED_BELOW}")
    if not 0 <= config.seed < 2**32:
        lines.append(f"seed={config.seed}: it lies in 0..{2**32 - 1}")
    return lines


def _save_problems(config: ConfigDict) -> list[str]:
    try:
        files = RunFiles.from_save(config.save)
        for file in (files.pickle, files.json, files.png, files.html):
            check_writable(file)
        if files.folder.exists() and not files.folder.is_dir():
            raise NotADirectoryError(
                f"cannot save to {files.folder}: it is a file, expected a folder; choose another save"
            )
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def names_in(listed: str) -> list[str]:
    """Returns the names in a list with commas, each once; `all`: all statistics but the costly and the light ones."""
    names = [name.strip() for name in listed.split(",") if name.strip()]
    cheap = [name for name in REGISTRY if name not in COSTLY | LIGHT]
    return list(dict.fromkeys(n for name in names for n in (cheap if name == "all" else [name])))
