"""Many pairs: the tests that between them see fine-tunes, disguises and pruning, and how far the predictions differ.

    python launch.py --config=configs/zoo.py:demo --models=configs/models/demo.yaml --save=runs/zoo --executor=local

`csu` and `match` are for pairs of one shape, `match_all` also for pruned models; `jsd`, which has no p-value, tells who
in a family is closest to whom. Argument `demo`: on the demo's text, in sizes that fit its models.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config that all pairs of a zoo share."""
    config = common.get_config("csu,match,match_all,jsd", arg)
    config.align = config.eval = False
    config.save = "runs/zoo.p"  # main.py's; launch.py has a folder of its own for each pair
    return config
