"""The demo: a small family of models, trained here in minutes, and each member traced to the base.

    python main.py --config=configs/demo.py

No network, no GPU, no downloads: the text comes from Python itself. The fine-tune and its disguised copy are pronounced
related, the copy is aligned back until its path is flat again, and the model from another seed is pronounced
independent: its path has a barrier, aligned or not.
Source: the four cases of Zhu et al. 2025, section 4 (arXiv 2502.12292), at a scale that fits a laptop.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of the demo; it takes `demo` as an argument, like every config, and means the same."""
    config = common.get_config("mode,csu,match", arg or "demo")
    del config.ft_model_id
    config.ft_model_ids = ("demo:finetune", "demo:disguised", "demo:independent")
    config.save = "runs/demo.p"
    return config
