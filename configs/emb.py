r"""`emb`: best-match cosine of the embedding rows of the tokens that both vocabularies have, median.

    python main.py --config=configs/emb.py:demo
    python main.py --config=configs/emb.py --config.base_model_id=meta-llama/Meta-Llama-3-8B \
        --config.ft_model_id=meta-llama/Llama-3.2-1B

Source: the reference program of Zhu et al. 2025 (arXiv 2502.12292). It has no p-value; read it beside a test that has.
"""

from ml_collections import ConfigDict

from tracing_jax.cli.config_files import config_from
from tracing_jax.options import RunOptions


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    return config_from(RunOptions(stat=("emb",)), arg)
