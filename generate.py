"""Has models write text: `python generate.py --models=org/a,org/b --prompts=prompts.txt --save=runs/generated`.

One file for each model, `<id>_gentext.json`: a list of {prompt, text, tokens, seed}. `main.py --dataset=generated`
reads such files.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.cli.user_errors import configure_logging, exit_on_user_error
from tracing_jax.data import GENERATED_FOLDER
from tracing_jax.distributed import initialized, is_main_process
from tracing_jax.experiment.opening import resolved
from tracing_jax.experiment.validation import DTYPES
from tracing_jax.generation import SamplingParams, file_of, generate, prompt_tokens, read_prompts
from tracing_jax.record import check_writable
from tracing_jax.sharding import Compute, make_mesh

_MODELS = flags.DEFINE_list("models", None, "Folders, Hub ids, org/name@revision or demo:<member>.", required=True)
_PROMPTS = flags.DEFINE_string("prompts", None, "A .txt (a prompt a line), .json or .jsonl file.")
_SAMPLES = flags.DEFINE_integer("num_samples", None, "Without prompts: so many texts from the start.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("max_new_tokens", 256, "The most tokens that follow a prompt.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Logits are divided by it; 0 takes the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many of the most likely tokens; 0 for all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens that have at least this probability.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Every draw follows from it and the number of the prompt.", lower_bound=0, upper_bound=2**32 - 1
)
_SAVE = flags.DEFINE_string("save", GENERATED_FOLDER, "The folder of the files.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Texts in flight.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of hidden states, matmuls and the cache.")
_DATA = flags.DEFINE_integer("mesh_data", -1, "Devices that texts are split over; -1 takes what is left.")
_MODEL = flags.DEFINE_integer("mesh_model", 1, "Devices that heads and MLP units are split over.")


def main(argv: Sequence[str]) -> None:
    """Checks everything that was asked for, then writes model after model."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if (_PROMPTS.value is None) == (_SAMPLES.value is None):
        raise app.UsageError("give --prompts=FILE, or --num_samples=N for texts without a prompt")
    sampling = SamplingParams(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    if lines := sampling.problems():
        raise app.UsageError("; ".join(lines))
    configure_logging()
    with exit_on_user_error(), initialized(), exit_on_user_error():
        folder = Path(_SAVE.value).expanduser()
        prompts = read_prompts(_PROMPTS.value) if _PROMPTS.value else _SAMPLES.value
        models = {model_id: open_checkpoint(resolved(model_id)) for model_id in _MODELS.value}
        files = {model_id: file_of(folder, model_id) for model_id in models}
        if len(set(files.values())) < len(files):
            raise ValueError(f"--models={','.join(models)}: two of them would write one file; give each a --save")
        for model_id, model in models.items():
            check_writable(files[model_id])
            prompt_tokens(model, prompts, _LENGTH.value, _SEED.value)
        compute = Compute(make_mesh(_DATA.value, _MODEL.value), _BATCH.value, DTYPES[_DTYPE.value])
        for model_id, model in models.items():
            file = generate(model, prompts, files[model_id], compute, sampling, _LENGTH.value, _SEED.value)
            if is_main_process():
                print(file)


if __name__ == "__main__":
    app.run(main)
