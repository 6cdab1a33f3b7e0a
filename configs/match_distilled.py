r"""`match_distilled`: gated students of any FFNs (no gate, other width, experts), matched as in `match`.

    python main.py --config=configs/match_distilled.py:demo
    python main.py --config=configs/match_distilled.py --config.base_model_id=openai-community/gpt2 \
        --config.ft_model_id=microsoft/DialoGPT-small

It trains two students a layer, which takes minutes on small models; it is no part of `--stat all`.

Source: Zhu et al. 2025, Independence Tests for Language Models (arXiv 2502.12292).
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    config = common.get_config("match_distilled", arg)
    if arg == "demo":
        config.align = config.eval = False  # an aligned pair has no p-value, and students as costly as the first
        config.num_tokens, config.distil_steps = 32768, 1000
    return config
