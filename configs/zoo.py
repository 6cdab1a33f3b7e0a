r"""A zoo: what tells which models are related, and who is closest to whom, at the cost of one forward pass per model.

    python launch.py --config=configs/zoo.py --models=configs/models/demo.yaml --save=zoo
    python main.py --config=configs/zoo.py --config.base_model_id=meta-llama/Llama-2-7b-hf \
        --config.ft_model_id=lmsys/vicuna-7b-v1.5

`csu` and `match_all` decide: the first is exact and strongest while units stand in their places, the second sees
through disguises and pruning. `jsd` and `l2` have no say in the verdict; by them the report finds closest relatives.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    config = common.get_config("csu,match_all,jsd,l2", arg)
    config.num_perm = 0
    config.align = False
    config.eval = False
    config.save = "runs/zoo-demo.p" if arg else "runs/zoo.p"
    return config
