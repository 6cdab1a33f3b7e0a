"""The demo: a small family of models, trained here in minutes, and each member traced to the base.

    python main.py --config=configs/demo.py

No network, no GPU, no downloads: the text comes from Python itself. The verdict on the fine-tune and on its disguised
copy is related, the copy is aligned back until its path is flat again, and there is no evidence on the model from
another seed: its path has a barrier, which permutations do not remove.

Source: the four cases of Zhu et al. 2025, section 4 (arXiv 2502.12292), at a scale that fits a laptop.
"""

from ml_collections import ConfigDict

from tracing_jax.cli.config_files import config_from
from tracing_jax.options import RunOptions


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of the demo; the argument `demo`, which every config takes, changes nothing."""
    config = config_from(RunOptions(stat=("mode", "csu", "match")), arg or "demo")
    config.ft_model_id = None
    config.ft_model_ids = "demo:finetune,demo:disguised,demo:independent"
    config.save = "runs/demo.p"
    return config
