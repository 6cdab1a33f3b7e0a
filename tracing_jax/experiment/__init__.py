"""A run: load, permute, statistics, align, statistics, perplexity, save. Options -> record -> files.

`run` and `trace` take options, a config or a nested mapping; everything below takes `RunOptions`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from ml_collections import ConfigDict

from tracing_jax.alignment import Alignment
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.distributed import is_main_process
from tracing_jax.experiment.inputs import RunInputs, open_inputs
from tracing_jax.experiment.memory import Placement, choose_placement
from tracing_jax.experiment.metadata import device_facts, file_stamps, token_facts, versions
from tracing_jax.experiment.models import resolve_model_id
from tracing_jax.experiment.saving import save_pairs, save_run
from tracing_jax.experiment.steps import StepTimer, run_steps
from tracing_jax.experiment.validation import (
    DEMO,
    check_options,
    controls_chosen,
    tests_chosen,
    with_sample_text,
)
from tracing_jax.options import RunOptions
from tracing_jax.record import RECORD_FORMAT, RunFiles, check_writable, commit, plain, with_digest
from tracing_jax.run_cache import RUN_CACHE, RunCache
from tracing_jax.statistics import over_pairs


def __getattr__(name: str) -> Any:
    """Imports what reports on merges when it is asked for: with it come scipy.stats and matplotlib."""
    if name == "report_on_merge":
        from tracing_jax.experiment.merging import report_on_merge

        return report_on_merge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ComputedRun",
    "ConfigError",
    "NotSavedError",
    "check_config",
    "compute",
    "report_on_merge",
    "resolve_model_id",
    "run",
    "save_run",
    "trace",
]

Config: TypeAlias = RunOptions | ConfigDict | Mapping[str, Any]
"""Options of a run, or a config or nested mapping of them; what it lacks has its default."""


class NotSavedError(OSError):
    """The files of a run could not be written, when all was computed: a full disk, or a folder that is missing.

    Attributes:
      records: what was found.
    """

    def __init__(self, error: OSError, records: list[dict[str, Any]]):
        super().__init__(
            f"the results could not be written: {error}; free space, or choose another save, and run again"
        )
        self.records = records


def run(config: Config) -> list[dict[str, Any]]:
    """Runs an experiment and returns its records: one for a pair, one per model where `ft_model_ids` names several.

    Raises:
      ConfigError: before anything is read; then the errors of reading checkpoints and text, before anything heavy.
    """
    options = check_config(config)
    if not options.ft_model_ids:
        return [trace(options)]
    assert options.save is not None, "checked above"
    files = RunFiles.from_save(options.save)
    pairs = _pairs(options, files)
    for pair in pairs.values():
        open_inputs(pair)  # whatever is wrong with the last pair is reported before the first is traced
    finished: list[RunCache] = []
    traced = {name: trace(pair, finished) for name, pair in pairs.items()}
    records = dict(zip(traced, _adjusted_over_pairs(list(traced.values()))))
    if is_main_process():
        try:
            save_pairs(records, files)
        except OSError as error:
            raise NotSavedError(error, list(records.values())) from error
    for run_cache in finished:
        run_cache.clear()
    return list(records.values())


def trace(config: Config, finished: list[RunCache] | None = None) -> dict[str, Any]:
    """Runs all steps on one pair, writes the files of the run, and returns its record.

    Args:
      config: names one fine-tuned model.
      finished: what an interrupted run had finished is deleted at the end, or, in a run of several pairs, added here.

    Raises:
      ConfigError: before anything is read; then the errors of reading checkpoints and text, before anything heavy.
    """
    options = check_config(config)
    outcome = compute(options)
    if options.save is not None and is_main_process():
        try:
            outcome.save(options.save)
        except OSError as error:
            raise NotSavedError(error, [outcome.record]) from error
    if finished is None:
        outcome.run_cache.clear()
    else:
        finished.append(outcome.run_cache)
    return outcome.record


@dataclass(frozen=True)
class ComputedRun:
    """What came out of a run on one pair, before anything is written.

    Attributes:
      record: plain data.
      alignment: the alignment of the fine-tuned model; None if none was made.
      arrays: statistic -> its arrays that are too large for the record.
      run_cache: the finished work, to be deleted when the files of the run are written.
    """

    record: dict[str, Any]
    alignment: Alignment | None
    arrays: Mapping[str, Mapping[str, np.ndarray]]
    run_cache: RunCache

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the files of the run and returns the path of the pickle.

        Raises:
          ValueError, OSError: the path names no pickle, or cannot be written.
        """
        files = RunFiles.from_save(fspath(path))
        check_writable(files.pickle)
        save_run(self.record, files, self.alignment, self.arrays)
        return files.pickle


def compute(config: Config) -> ComputedRun:
    """Runs all steps on one pair and returns what came out; files are written only for an interrupted run to resume.

    Raises:
      ConfigError: before anything is read; then the errors of reading checkpoints and text, before anything heavy.
    """
    options = check_config(config)
    timer = StepTimer()
    with timer.step("open"):
        inputs = open_inputs(options)
        placement = choose_placement(options, inputs)
    run_cache, note = _run_cache(options, inputs, placement)
    inputs.notes.extend([note] if note else [])
    found = run_steps(options, inputs, placement, run_cache, timer)
    record = plain(
        {
            "format": RECORD_FORMAT,
            "args": options.as_dict(),
            "commit": commit(),
            "versions": versions(),
            "device": device_facts(placement.mesh),
            "seed": options.seed,
            "chosen": {"tests": tests_chosen(options), "controls": controls_chosen(options)},
            "tokens": token_facts(inputs),
            **found.as_dict(options.level),
            "seconds": timer.seconds,
            "notes": inputs.notes,
        }
    )
    arrays = {name: result.arrays for name, result in found.before.items() if result.arrays}
    return ComputedRun(with_digest(record), found.alignment, arrays, run_cache)


def check_config(config: Config) -> RunOptions:
    """Returns the typed options of a run, checked as far as they can be without reading a model.

    Raises:
      ConfigError: all findings, one line each.
    """
    options = RunOptions.from_config(config).with_save_path()
    check_options(options)
    return with_sample_text(options)


def _pairs(options: RunOptions, files: RunFiles) -> dict[str, RunOptions]:
    """Returns the options of each pair by a name that is its own, saved in the folder of the run."""
    pairs: dict[str, RunOptions] = {}
    for model_id in options.ft_model_ids:
        name = model_id.removeprefix(DEMO).rstrip("/").split("/")[-1]
        if name in pairs:
            name = f"{name}-{len(pairs) + 1}"
        pairs[name] = replace(options, ft_model_ids=(), ft_model_id=model_id, save=str(files.folder / f"{name}.p"))
    return pairs


def _adjusted_over_pairs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records with `over_pairs_log10_p` in the verdict: its p-value adjusted over the pairs as well."""
    adjusted = over_pairs([record["verdict"]["adjusted_log10_p"] for record in records])
    return [
        with_digest({**record, "verdict": {**record["verdict"], "over_pairs_log10_p": log10_p}})
        for record, log10_p in zip(records, adjusted)
    ]


def _run_cache(options: RunOptions, inputs: RunInputs, placement: Placement) -> tuple[RunCache, str | None]:
    """Returns what is left of an interrupted run of these options on these files, and a note on it.

    Weights that are read from the Hub in ranges have no files here: their commit tells them apart.

    Nothing is kept of a run that is not saved. Blocks of tokens go through the models by the batch, and how many these
    are depends on where the models are.
    """
    if options.save is None:
        return RunCache(), None
    facts = {
        "config": {name: value for name, value in options.as_dict().items() if name not in ("save", "cache_dir")},
        "versions": versions(),
        "commit": commit(),
        "files": {side: file_stamps(model.files()) for side, model in inputs.models().items()},
        "readings": {side: model.reading for side, model in inputs.models().items()},
        "revisions": {side: [model.id, model.revision] for side, model in inputs.models().items()},
        "tokens": None if inputs.text is None else inputs.text.base.sha256,
        "vocabularies": inputs.vocabularies.digest(),
        "mesh": dict(placement.mesh.shape),
        "memory": placement.memory,
    }
    return RunCache.open(RunFiles.from_save(options.save).folder / RUN_CACHE, facts)
