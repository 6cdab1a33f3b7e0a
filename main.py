"""Traces one pair of checkpoints, or one base against several: `python main.py --config=configs/mode.py`.

The short flags override fields of the config; given alone they select `configs/<stat>.py`:

    python main.py --base_model_id A --ft_model_id B --permute --align --dataset wikitext --stat mode --save results.p
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from tracing_jax import experiment
from tracing_jax.cli.user_errors import configure_logging, exit_on_user_error
from tracing_jax.distributed import initialized, is_main_process
from tracing_jax.report import summary
from tracing_jax.statistics import REGISTRY

_CONFIGS = Path(__file__).parent / "configs"
_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/, with :demo for the demo family.")

_TEXT = {
    "base_model_id": "Base model: a folder, a Hub id, org/name@revision, or demo:<member>.",
    "ft_model_id": "The model that may descend from it.",
    "dataset": "Text: a name such as wikitext, or a local txt, json, jsonl or parquet file.",
    "dataset_id": "Text: the id of a data set on the Hub.",
    "disguise": "Rewrite the fine-tuned model's own weights first: rotate, gains, pad, ... with commas, or all.",
    "stat": "Statistics: mode, cos, emb, several with commas, or all.",
    "save": "The pickle to write; json, png, html and a .run folder lie beside it.",
}
_SWITCHES = {
    "permute": "Permute the fine-tuned model's own weights first.",
    "align": "Align the fine-tuned model to base and compute the statistics again.",
    "attn": "mode: move attention along the path too.",
    "emb": "mode: move embeddings, head and final norm too.",
    "eval": "Perplexity of both models.",
}
for _name, _help in _TEXT.items():
    flags.DEFINE_string(_name, None, _help)
for _name, _help in _SWITCHES.items():
    flags.DEFINE_boolean(_name, None, _help)
flags.DEFINE_enum("fail_on", None, ["related"], "Exit with status 3 if the verdict on any pair is this.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, of several that srun does not start.")
flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, with --coordinator.")
flags.DEFINE_integer("seed", None, "Every random draw of the run follows from it.")


def with_default_config(argv: Sequence[str]) -> list[str]:
    """Returns argv with `--config=configs/<stat>.py` put in front if no config is named; the default is mode."""
    names = [argument.lstrip("-").split("=")[0] for argument in argv[1:]]
    if "config" in names:
        return list(argv)
    stat = "mode"
    for i, name in enumerate(names, start=1):
        if name == "stat":
            stat = argv[i].split("=", 1)[1] if "=" in argv[i] else (argv[i + 1] if i + 1 < len(argv) else stat)
    known = stat if stat in REGISTRY else "mode"  # several statistics, or a name that the run itself will refuse
    return [argv[0], f"--config={_CONFIGS / known}.py", *argv[1:]]


def _override(config: ConfigDict) -> None:
    """Puts the short flags that were given into the config."""
    given = {name: flags.FLAGS[name].value for name in (*_TEXT, *_SWITCHES, "seed")}
    with config.unlocked():
        config.update({name: value for name, value in given.items() if value is not None})
        if given["ft_model_id"] is not None and "ft_model_ids" in config:
            del config.ft_model_ids


def main(argv: Sequence[str]) -> None:
    """Runs the experiment of the config and prints its summary."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    configure_logging()
    config, given = _CONFIG.value, flags.FLAGS
    _override(config)
    with (
        exit_on_user_error(),
        initialized(given.coordinator, given.num_processes, given.process_id),
        exit_on_user_error(),
    ):
        records = experiment.run(config)
        if is_main_process():
            print(summary(records))
        if given.fail_on in [record["verdict"]["verdict"] for record in records]:
            sys.exit(3)


if __name__ == "__main__":
    app.run(main, argv=with_default_config(sys.argv))
