"""Many pairs: what tells which models are related, and who is closest to whom.

    python launch.py --config=configs/zoo.py:demo --models=configs/models/demo.yaml --save=runs/zoo --executor=local

`csu` and `match_all` decide: the first is exact, and strongest while units stand in their places; the second sees
through disguises and pruning. `jsd` and `l2` have no say in a verdict; by them the report finds closest relatives (see
docs/zoo.md). Argument `demo`: on the demo's text, in sizes that fit its models.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config that all pairs of a zoo share."""
    config = common.get_config("csu,match_all,jsd,l2", arg)
    config.num_perm = 0  # l2 as a distance alone
    config.align = config.eval = False
    config.save = "runs/zoo.p"  # main.py's; launch.py has a folder of its own for each pair
    return config
