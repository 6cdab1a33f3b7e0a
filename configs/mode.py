r"""`mode`: loss along the straight path between two models; its midpoint, its barrier and the curve.

    python main.py --config=configs/mode.py:demo
    python main.py --config=configs/mode.py --config.base_model_id=meta-llama/Llama-2-7b-hf \
        --config.ft_model_id=lmsys/vicuna-7b-v1.5 --config.mode.attn --config.mode.emb

Any other statistic needs no file of its own: it is run with `--stat`, on the demo family too:

    python main.py --base_model_id=meta-llama/Llama-2-7b-hf --ft_model_id=lmsys/vicuna-7b-v1.5 --stat=csh
    python main.py --config=configs/mode.py:demo --stat=csh

Source: Zhu et al. 2025, Independence Tests for Language Models (arXiv 2502.12292), which reports midpoint losses of
1.927 nats per token for this pair and 12.26 for the independent huggyllama/llama-7b.
"""

from ml_collections import ConfigDict

from tracing_jax.cli.config_files import config_from
from tracing_jax.options import RunOptions


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; `demo` as the argument runs it on the demo family."""
    return config_from(RunOptions(stat=("mode",)), arg)
