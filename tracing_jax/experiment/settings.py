"""The config of a run: what can be checked before anything is read."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from tracing_jax import demo
from tracing_jax.axes import PERMUTABLE
from tracing_jax.record import RunFiles, check_writable
from tracing_jax.statistics import REGISTRY

DEMO = "demo:"
"""What stands before the name of a member of the demo family, in place of a folder or Hub id."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Names of the computing dtypes."""


class ConfigError(ValueError):
    """The config of a run asks for something that does not exist or does not fit; all findings at once."""


def check_config(config: ConfigDict) -> None:
    """Checks every field that can be checked without reading a model.

    Raises:
      ConfigError: all findings, one line each.
    """
    lines = []
    for side in ("base_model_id",) + (() if "ft_model_ids" in config else ("ft_model_id",)):
        if not config[side]:
            lines.append(f"{side} is not set: a local folder, a Hub id, or demo:<{'|'.join(demo.MEMBERS)}>")
        elif config[side].startswith(DEMO) and config[side].removeprefix(DEMO) not in demo.MEMBERS:
            lines.append(f"{side}={config[side]}: the demo family has {', '.join(demo.MEMBERS)}")
    if not names_in(config.stat):
        lines.append(f"no statistic is asked for; there are {', '.join(REGISTRY)}, or all")
    if unknown := [name for name in names_in(config.stat) if name not in REGISTRY]:
        lines.append(f"unknown statistic {', '.join(unknown)}; there are {', '.join(REGISTRY)}, or all")
    for name in ("permute_axes", "align_axes"):
        if unknown := [axis for axis in names_in(config[name]) if axis not in PERMUTABLE]:
            lines.append(f"{name}: unknown axes {', '.join(unknown)}; there are {', '.join(PERMUTABLE)}")
    if config.align_evidence not in ("weights", "activations"):
        lines.append(f"align_evidence={config.align_evidence}: it is weights or activations")
    if config.dtype not in DTYPES:
        lines.append(f"dtype={config.dtype}: it is one of {', '.join(DTYPES)}")
    if outside := [alpha for alpha in config.alphas if not 0 <= alpha <= 1]:
        lines.append(f"alphas {outside} are outside 0..1")
    for name, least in (("block_size", 2), ("batch_size", 1), ("num_tokens", 2)):
        if config[name] < least:
            lines.append(f"{name}={config[name]}: at least {least}")
    try:
        check_writable(RunFiles.from_save(config.save).pickle)
    except (OSError, ValueError) as error:
        lines.append(str(error))
    if lines:
        raise ConfigError("\n  ".join(["the config cannot run:", *lines]) if len(lines) > 1 else lines[0])


def names_in(listed: str) -> list[str]:
    """Returns the names in a list with commas; `all` means every statistic."""
    names = [name.strip() for name in listed.split(",") if name.strip()]
    return list(REGISTRY) if names == ["all"] else names
