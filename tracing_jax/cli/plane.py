"""`tracing-jax plane`: the loss over the plane through three models, as a heatmap."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.compare import MODEL
from tracing_jax.cli.errors import configure_logging, exit_on_usage_error, exit_on_user_error
from tracing_jax.cli.startup import keep_compiled_programs
from tracing_jax.dataclass_options import from_values, option, option_of
from tracing_jax.options import Mesh, RunOptions

USAGE = "A B C"


@dataclass(frozen=True)
class PlaneOptions:
    """Where losses are computed, on which text, and what is written."""

    grid: int = option(15, "Points along each side of the grid.", at_least=2)
    margin: float = option(
        0.25, "How far the grid reaches beyond the models, as a share of their longer extent.", at_least=0
    )
    attn: bool = option(True, "Move attention; otherwise it is that of A.")
    emb: bool = option(True, "Move embeddings, head and final norm; otherwise they are those of A.")
    dataset: str | None = option_of(
        RunOptions, "dataset", default=None, meaning="The text, named as in compare; by default one of this package."
    )
    num_tokens: int = option_of(
        RunOptions, "num_tokens", default=8192, meaning="The most tokens of A's tokenizer that are read."
    )
    block_size: int = option_of(RunOptions, "block_size")
    batch_size: int = option_of(RunOptions, "batch_size")
    memory: str = option_of(
        RunOptions,
        "memory",
        meaning="resident holds the models whole, stream takes them layer by layer, auto decides by what is free.",
    )
    dtype: str = option_of(RunOptions, "dtype")
    save: str = option("runs/plane.json", "A .json file for the record; the figure is written beside it.")
    json: bool = option(False, "Print the record as JSON, and nothing else, on standard output.")
    mesh: Mesh = Mesh()  # noqa: RUF009 (it is frozen)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    for name, where in (("A", "the origin"), ("B", "on the first axis"), ("C", "beside it")):
        parser.add_argument(name, metavar=name, help=f"model {name}, {where}: {MODEL}")
    add_options(parser, PlaneOptions)


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    configure_logging()
    with exit_on_usage_error():
        options = from_values(PlaneOptions, given(parsed, PlaneOptions))
        if Path(options.save).suffix != ".json":
            raise ValueError(f"--save={options.save}: expected a file that ends in .json; the figure is beside it")
        from tracing_jax.record import check_writable

        for suffix in (".json", ".png"):
            check_writable(Path(options.save).with_suffix(suffix))
    with exit_on_user_error():
        keep_compiled_programs()
        from tracing_jax.experiment.planes import plane_report

        shared = ("dataset", "num_tokens", "block_size", "batch_size", "memory", "dtype", "mesh")
        asked = RunOptions(base_model_id=parsed.A, ft_model_id=parsed.B)
        asked = replace(asked, **{name: getattr(options, name) for name in shared})
        asked = replace(asked, mode=replace(asked.mode, attn=options.attn, emb=options.emb))
        found = plane_report(asked, parsed.C, options.grid, options.margin)
        found.save(options.save)
        print(json.dumps(found.record, indent=1, ensure_ascii=False) if options.json else found)
        if not options.json:
            print(f"\nfigure  {Path(options.save).with_suffix('.png')}\nrecord  {options.save}")
