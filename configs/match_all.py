r"""`match_all`: `match` on every pair of layers: which layer of one model comes from which layer of the other?

    python main.py --config=configs/match_all.py:demo
    python main.py --config=configs/match_all.py --config.base_model_id=meta-llama/Llama-3.1-8B \
        --config.ft_model_id=meta-llama/Llama-3.2-3B

Source: Zhu et al. 2025, Independence Tests for Language Models (arXiv 2502.12292).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    return common.get_config("match_all", arg)
