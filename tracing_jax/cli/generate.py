"""`tracing-jax generate` and `generate.py`: texts that models write, as `main.py --dataset=generated` reads them."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.errors import configure_logging, exit_on_usage_error, exit_on_user_error
from tracing_jax.cli.startup import keep_compiled_programs
from tracing_jax.dataclass_options import REQUIRED, from_values, option, option_of
from tracing_jax.options import DTYPE_NAMES, Mesh, RunOptions

USAGE = "--models A,B,..."


@dataclass(frozen=True)
class GenerateOptions:
    """What is written, by which models, and how."""

    models: tuple[str, ...] = option(REQUIRED, "Folders, Hub ids, org/name@revision or demo:<member>.")
    prompts: str | None = option(None, "A .txt (a prompt a line), .json or .jsonl file.")
    num_samples: int | None = option(None, "Without prompts: so many texts from the start.", at_least=1)
    max_new_tokens: int = option(256, "The most tokens that follow a prompt.", at_least=1)
    temperature: float = option(1.0, "Logits are divided by it; 0 takes the most likely token.", at_least=0)
    top_k: int = option(0, "Draw from so many of the most likely tokens; 0 for all.", at_least=0)
    top_p: float = option(1.0, "Draw from the fewest tokens that have at least this probability.", above=0, at_most=1)
    seed: int = option_of(RunOptions, "seed", meaning="Every draw follows from it and the number of the prompt.")
    save: str = option("runs/generated", "The folder of the files.")
    batch_size: int = option(16, "Texts in flight.", at_least=1)
    dtype: str = option("float32", "Of hidden states, matmuls and the cache.", choices=DTYPE_NAMES)
    mesh: Mesh = Mesh()  # noqa: RUF009 (it is frozen)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    add_options(parser, GenerateOptions)


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    with exit_on_usage_error():
        options = from_values(GenerateOptions, given(parsed, GenerateOptions))
    write_texts(options)


def write_texts(options: GenerateOptions) -> None:
    """Checks everything that was asked for, then writes model after model."""
    configure_logging()
    with exit_on_usage_error():
        if (options.prompts is None) == (options.num_samples is None):
            raise ValueError("give --prompts=FILE, or --num_samples=N for texts without a prompt")
    with exit_on_user_error():
        keep_compiled_programs()
        from tracing_jax.distributed import initialized

        with initialized(), exit_on_user_error():
            _write(options)


def _write(options: GenerateOptions) -> None:
    from tracing_jax.checkpoint import WeightsOnly, open_checkpoint
    from tracing_jax.distributed import is_main_process
    from tracing_jax.experiment.models import resolve_model_id
    from tracing_jax.experiment.validation import DTYPES
    from tracing_jax.generation import SamplingParams, file_of, generate_texts, prompt_tokens, read_prompts
    from tracing_jax.record import check_writable
    from tracing_jax.sharding import Compute, make_mesh

    folder = Path(options.save).expanduser()
    prompts = read_prompts(options.prompts) if options.prompts else options.num_samples
    assert prompts is not None, "one of both is given"
    models = {
        model_id: open_checkpoint(resolve_model_id(model_id), weights_only=WeightsOnly()) for model_id in options.models
    }
    files = {model_id: file_of(folder, model_id) for model_id in models}
    if len(set(files.values())) < len(files):
        raise ValueError(f"--models={','.join(models)}: two of them would write one file; give each a --save")
    for model_id, model in models.items():
        check_writable(files[model_id])
        prompt_tokens(model, prompts, options.max_new_tokens, options.seed)
    sampling = SamplingParams(options.temperature, options.top_k, options.top_p)
    compute = Compute(make_mesh(options.mesh.data, options.mesh.model), options.batch_size, DTYPES[options.dtype])
    for model_id, model in models.items():
        file = generate_texts(model, prompts, files[model_id], compute, sampling, options.max_new_tokens, options.seed)
        if is_main_process():
            print(file)
