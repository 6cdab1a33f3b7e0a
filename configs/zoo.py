"""Many pairs: what shows which models are related, and who is closest to whom.

    python launch.py --config=configs/zoo.py:demo --models=configs/models/demo.yaml --save=runs/zoo --executor=local

The tests of `auto`, as in `compare`, decide; where none applies to a pair, that is the answer. `jsd` and `l2` do not
enter a verdict; by them the report finds closest relatives (see docs/zoo.md). The text is the one of the package, or
`--config.dataset`. Argument `demo`: on the demo's text, in sizes that fit its models.
"""

from ml_collections import ConfigDict

from tracing_jax.cli.config_files import config_from
from tracing_jax.options import ZOO


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    config = config_from(ZOO, arg)
    config.align = config.eval = False
    config.save = "runs/zoo.p"  # main.py's; launch.py has a folder of its own for each pair
    return config
