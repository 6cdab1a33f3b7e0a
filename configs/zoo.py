"""Many pairs: what tells which models are related, and who is closest to whom.

    python launch.py --config=configs/zoo.py:demo --models=configs/models/demo.yaml --save=runs/zoo --executor=local

`csu` and `match_all` decide: the first is exact, and strongest where units are in their original order; the second
finds disguised and pruned models too. `jsd` and `l2` do not enter a verdict; by them the report finds closest relatives
(see docs/zoo.md). Argument `demo`: on the demo's text, in sizes that fit its models.
"""

from ml_collections import ConfigDict

from tracing_jax.options import ZOO, config_from


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    config = config_from(ZOO, arg)
    config.align = config.eval = False
    config.save = "runs/zoo.p"  # main.py's; launch.py has a folder of its own for each pair
    return config
