"""Options as the ConfigDict of a config file, whose fields `--config.NAME=...` sets."""

import operator

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tracing_jax.dataclass_options import options_of, sections_of
from tracing_jax.options import RunOptions


def config_from(options: RunOptions, arg: str = "") -> ConfigDict:
    """Returns the ConfigDict of a config file; its argument `demo` runs it on the demo family.

    Raises:
      ValueError: any other argument.
    """
    if arg not in ("", "demo"):
        raise ValueError(f"a config takes the argument demo or none, found {arg!r}")
    return to_config(options.on_demo() if arg else options)


def to_config(options: RunOptions) -> ConfigDict:
    """Returns the options as a ConfigDict; lists of names are text with commas."""
    config = ConfigDict(type_safe=False)  # `RunOptions.from_config` checks the types, and names the option
    config.update({name: ConfigDict(type_safe=False) for name in sections_of(RunOptions)})
    for found in options_of(RunOptions):
        section, _, name = found.name.rpartition(".")
        value = operator.attrgetter(found.name)(options)
        if value is None:
            value = placeholder(str)
        elif found.kind == tuple[str, ...]:
            value = ",".join(value)
        (config[section] if section else config)[name] = value
    return config
