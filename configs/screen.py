r"""`screen`: a first test of a tenth of the weights at most: `csu` on sampled units, `match` on three layers.

    python main.py --config=configs/screen.py:demo
    python main.py --config=configs/screen.py --config.base_model_id=meta-llama/Llama-2-7b-hf \
        --config.ft_model_id=lmsys/vicuna-7b-v1.5

Source: Zhu et al. 2025, Independence Tests for Language Models (arXiv 2502.12292).
"""

from ml_collections import ConfigDict

from tracing_jax.cli.config_files import config_from
from tracing_jax.options import RunOptions


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    return config_from(RunOptions(stat=("screen",)), arg)
