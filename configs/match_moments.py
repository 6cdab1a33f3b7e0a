r"""`match_moments`: gate and up rows matched by how other layers' weights answer to them; no text, no embeddings.

    python main.py --config=configs/match_moments.py:demo
    python main.py --config=configs/match_moments.py --config.base_model_id=meta-llama/Llama-2-7b-hf \
        --config.ft_model_id=lmsys/vicuna-7b-v1.5

Source: the test of Zhu et al. 2025, Independence Tests for Language Models (arXiv 2502.12292); the signatures are ours.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    return common.get_config("match_moments", arg)
