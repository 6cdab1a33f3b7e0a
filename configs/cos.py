r"""`cos`: best-match cosine of the MLP units' gate weights, median per layer, mean over layers.

    python main.py --config=configs/cos.py:demo
    python main.py --config=configs/cos.py --config.base_model_id=meta-llama/Llama-2-7b-hf \
        --config.ft_model_id=codellama/CodeLlama-7b-hf

Source: the reference program of Zhu et al. 2025 (arXiv 2502.12292). It has no p-value; read it beside a test that has.
"""

from ml_collections import ConfigDict

from tracing_jax.cli.config_files import config_from
from tracing_jax.options import RunOptions


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    return config_from(RunOptions(stat=("cos",)), arg)
