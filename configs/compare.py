r"""The default verdict: all tests of bounded cost that apply, exact and calibrated ones. It needs no text.

    python main.py --config=configs/compare.py:demo
    python main.py --config=configs/compare.py --config.base_model_id=meta-llama/Llama-2-7b-hf \
        --config.ft_model_id=lmsys/vicuna-7b-v1.5

`tracing-jax compare A B` is the same. With `--dataset=wikitext` activations on that text are compared as well.

Source: Zhu et al. 2025, Independence Tests for Language Models (arXiv 2502.12292).
"""

from ml_collections import ConfigDict

from tracing_jax.cli.config_files import config_from
from tracing_jax.options import COMPARE


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    return config_from(COMPARE, arg)
