"""The seven steps of a run: load, permute, statistic, align, statistic, perplexity, save. Config -> record -> files."""

import contextlib
import io
import pickle
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from tracing_jax.alignment import Alignment
from tracing_jax.data import TokenBlocks
from tracing_jax.distributed import is_main_process
from tracing_jax.experiment.loading import (
    Layout,
    align_ft,
    lay_out,
    load_pair,
    permute_ft,
    prove_disguise,
    write_aligned,
)
from tracing_jax.experiment.metadata import (
    alignment_facts,
    device_facts,
    file_stamps,
    model_facts,
    token_facts,
    versions,
)
from tracing_jax.experiment.opening import Opened, inapplicable, open_pair
from tracing_jax.experiment.validation import DEMO, ConfigError, check_options
from tracing_jax.forward import token_losses
from tracing_jax.options import RunOptions
from tracing_jax.record import FORMAT, RunFiles, atomic_write, commit, legacy_dict, plain, write_json, write_pickle
from tracing_jax.report import figure_of_pairs, figure_of_run, html, pairs_html, save_png
from tracing_jax.run_cache import RUN_CACHE, RunCache
from tracing_jax.sources import ParamSource
from tracing_jax.statistics import Pair, Result, Statistic, over_pairs, verdict

__all__ = ["ConfigError", "check_config", "run", "save", "trace"]


def run(config: RunOptions | ConfigDict | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs an experiment and returns its records: one for a pair, one per model where `ft_model_ids` names several.

    Args:
      config: options, or a config or nested mapping of them; what it lacks has its default.

    Raises:
      ConfigError: before anything is read; then the errors of reading checkpoints and text, before anything heavy.
    """
    options = check_config(config)
    if not options.ft_model_ids:
        return [trace(options)]
    files = RunFiles.from_save(options.save)
    pairs = _pairs(options, files)
    for pair in pairs.values():
        open_pair(pair)  # whatever is wrong with the last pair is said before the first is traced
    finished: list[RunCache] = []
    traced = {name: trace(pair, finished) for name, pair in pairs.items()}
    records = dict(zip(traced, _side_by_side(list(traced.values()))))
    if is_main_process():
        _save_family(records, files)
    for run_cache in finished:
        run_cache.clear()
    return list(records.values())


def _save_family(records: Mapping[str, dict[str, Any]], files: RunFiles) -> None:
    write_json(files.json, {"format": FORMAT, "records": list(records.values())})
    atomic_write(
        files.pickle, pickle.dumps({name: legacy_dict(record) for name, record in records.items()}, protocol=4)
    )
    save_png(figure_of_pairs(list(records.values())), files.png)
    pages = [urllib.parse.quote(f"{files.folder.name}/{name}.html") for name in records]
    atomic_write(files.html, pairs_html(list(records.values()), pages).encode())
    logging.info("wrote %s, json, png and html; each pair lies in %s", files.pickle, files.folder)


def _side_by_side(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records with `over_pairs_log10_p` in the verdict: its p-value adjusted over the pairs as well."""
    adjusted = over_pairs([record["verdict"]["adjusted_log10_p"] for record in records])
    return [
        {**record, "verdict": {**record["verdict"], "over_pairs_log10_p": log10_p}}
        for record, log10_p in zip(records, adjusted)
    ]


def check_config(config: RunOptions | ConfigDict | Mapping[str, Any]) -> RunOptions:
    """Returns the typed options of a run, checked as far as they can be without reading a model.

    Raises:
      ConfigError: all findings, one line each.
    """
    options = RunOptions.from_config(config).with_save_path()
    check_options(options)
    return options


def _pairs(options: RunOptions, files: RunFiles) -> dict[str, RunOptions]:
    """Returns the options of each pair by a name that is its own, saved in the folder of the run."""
    pairs: dict[str, RunOptions] = {}
    for model_id in options.ft_model_ids:
        name = model_id.removeprefix(DEMO).rstrip("/").split("/")[-1]
        if name in pairs:
            name = f"{name}-{len(pairs) + 1}"
        pairs[name] = replace(options, ft_model_ids=(), ft_model_id=model_id, save=str(files.folder / f"{name}.p"))
    return pairs


def trace(
    config: RunOptions | ConfigDict | Mapping[str, Any], finished: list[RunCache] | None = None
) -> dict[str, Any]:
    """Runs the seven steps on one pair, writes the files of the run, and returns its record.

    What an interrupted run had finished is deleted then, or, for a run of several pairs, handed over in `finished`.
    """
    options = check_config(config)
    clock = _Clock()
    with clock.step("open"):
        opened = open_pair(options)
        layout = lay_out(options, opened)
    run_cache, word = _progress(options, opened, layout)
    opened.notes.extend([word] if word else [])
    found = _steps(options, opened, layout, run_cache, clock)
    record = plain(
        {
            **_circumstances(options, layout),
            "tokens": token_facts(opened),
            **found.as_dict(options.level),
            "seconds": clock.seconds,
            "notes": opened.notes,
        }
    )
    if is_main_process():
        arrays = {name: result.arrays for name, result in found.before.items() if result.arrays}
        save(record, RunFiles.from_save(options.save), found.alignment, arrays)
    if finished is None:
        run_cache.clear()
    else:
        finished.append(run_cache)
    return record


@dataclass
class _Found:
    """What the steps of a run found; None and empty for those that were not asked for.

    Attributes:
      models: the facts of every model.
      before, after: the results of the statistics, before and after the alignment.
    """

    models: Mapping[str, Any]
    before: Mapping[str, Result]
    after: Mapping[str, Result] = field(default_factory=dict)
    disguise: Mapping[str, Any] | None = None
    permutation: Mapping[str, Any] | None = None
    alignment: Alignment | None = None
    perplexity: Mapping[str, Any] | None = None

    def as_dict(self, level: float) -> dict[str, Any]:
        """Returns the fields of the record, with the verdict at this level."""
        return {
            "models": self.models,
            "disguised": self.disguise,
            "permuted": self.permutation,
            "alignment": None if self.alignment is None else alignment_facts(self.alignment),
            "statistics": {
                name: {"non_aligned": result.as_dict(), "aligned": self.after[name].as_dict() if self.after else None}
                for name, result in self.before.items()
            },
            "verdict": verdict(self.before, level).as_dict(),
            "perplexity": self.perplexity,
        }


def _steps(options: RunOptions, opened: Opened, layout: Layout, run_cache: RunCache, clock: "_Clock") -> _Found:
    """Runs all steps but saving that are asked for. A model that another takes the place of lives no longer."""
    with clock.step("load"):
        pair = load_pair(options, opened, layout, run_cache)
    models = _model_facts_beside_the_work(opened, hashed=not (opened.is_first_look or options.max_layers))
    disguise = permutation = None
    if opened.rewrites:
        with clock.step("disguise"):
            disguise = prove_disguise(options, opened, pair)
    if options.permute:
        with clock.step("permute"):
            pair, permutation = permute_ft(options, pair)
    with clock.step("statistic"):
        found = _Found({}, _compute(opened, pair, opened.not_applicable), {}, disguise, permutation)
    if options.align and not opened.not_alignable:
        with clock.step("align"):
            pair, found.alignment = align_ft(options, opened, pair)
    if found.alignment is not None:
        with clock.step("statistic aligned"):
            reasons = inapplicable(opened.statistics, pair.base.arch, pair.ft.arch, opened.vocabularies)
            found.after = _compute(opened, pair, reasons)
    if options.eval:
        with clock.step("perplexity"):
            found.perplexity = {
                "base": _perplexity(pair, pair.base, opened.blocks_base, "base"),
                "ft": _perplexity(pair, pair.ft, opened.blocks_ft, "ft"),
            }
    if options.save_aligned and found.alignment is not None:
        with clock.step("write aligned"):
            write_aligned(options, opened, pair)
    with clock.step("hashes"):
        found.models = {side: facts.result() for side, facts in models.items()}
    return found


def _model_facts_beside_the_work(opened: Opened, hashed: bool) -> dict[str, Future[dict[str, Any]]]:
    """Begins to hash the files of every model on a thread: that reads them whole, and frees the interpreter."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hashes")
    found = {name: thread.submit(model_facts, checkpoint, hashed) for name, checkpoint in opened.models().items()}
    thread.shutdown(wait=False)
    return found


def _circumstances(options: RunOptions, layout: Layout) -> dict[str, Any]:
    """Returns what was asked, and what it ran with."""
    return {
        "format": FORMAT,
        "args": options.as_dict(),
        "commit": commit(),
        "versions": versions(),
        "device": device_facts(layout.mesh),
        "seed": options.seed,
    }


def save(
    record: dict[str, Any],
    files: RunFiles,
    alignment: Alignment | None = None,
    arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Writes the files of one run, each whole or not at all; the JSON, written last, says that all are there."""
    write_pickle(files.pickle, record)
    (files.folder / "alignment.npz").unlink(missing_ok=True)  # of an earlier run
    if alignment is not None:
        files.folder.mkdir(exist_ok=True)
        atomic_write(files.folder / "alignment.npz", _npz(alignment.arrays))
    for name, found in (arrays or {}).items():
        files.folder.mkdir(exist_ok=True)
        atomic_write(files.folder / f"{name}.npz", _npz(found))
    save_png(figure_of_run(record), files.png)
    atomic_write(files.html, html(record).encode())
    write_json(files.json, record)
    logging.info("wrote %s and, beside it, json, png and html", files.pickle)


def _compute(opened: Opened, pair: Pair, not_applicable: Mapping[str, str]) -> dict[str, Result]:
    """Steps 3 and 5: every statistic that applies; of the others the reason."""
    results = {}
    for name, statistic in opened.statistics.items():
        if reason := not_applicable.get(name):
            results[name] = Result(None, name, not_applicable=reason)
        else:
            results[name] = _remembered(name, statistic, pair)
    return results


def _remembered(name: str, statistic: Statistic, pair: Pair) -> Result:
    """Returns the result of a statistic, kept from an interrupted run or computed now."""
    run_cache = pair.run_cache.scope("results")
    fields: dict[str, Any] | None = run_cache.load(dict, name)
    if fields is not None:
        return Result.restored(fields, run_cache.load_arrays(name) or {})
    result = statistic.compute(pair)
    if result.arrays:
        run_cache.save_arrays(lambda: result.arrays, name)
    run_cache.save(result.as_dict(), name)
    return result


def _progress(options: RunOptions, opened: Opened, layout: Layout) -> tuple[RunCache, str | None]:
    """Returns what is left of an interrupted run of this config on these files, and a word on it.

    Blocks of tokens go through the models by the batch, and how many these are depends on where the models lie.
    """
    facts = {
        "config": {name: value for name, value in options.as_dict().items() if name not in ("save", "cache_dir")},
        "versions": versions(),
        "commit": commit(),
        "files": {side: file_stamps(model.tensors.files()) for side, model in opened.models().items()},
        "tokens": None if opened.blocks_base is None else opened.blocks_base.sha256,
        "mesh": dict(layout.mesh.shape),
        "memory": layout.memory,
    }
    return RunCache.open(RunFiles.from_save(options.save).folder / RUN_CACHE, facts)


def _perplexity(pair: Pair, model: ParamSource, blocks: TokenBlocks | None, side: str) -> dict[str, float]:
    """Step 6: perplexity of one model on its own tokens of the text, per token and per byte."""
    assert blocks is not None
    run_cache = pair.run_cache.scope("perplexity", side)
    losses = token_losses(model, blocks.tokens, pair.compute, f"perplexity of {side}", run_cache)
    nats, num_bytes = float(losses.sum(dtype=np.float64)), int(blocks.num_bytes.sum())
    return {
        "loss_nats_per_token": nats / losses.size,
        "perplexity": float(np.exp(nats / losses.size)),
        "nats_per_byte": nats / num_bytes,
        "perplexity_per_byte": float(np.exp(nats / num_bytes)),
        "tokens": losses.size,
        "bytes": num_bytes,
    }


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


@dataclass
class _Clock:
    """Seconds per step of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measures one step, and says on the log that it has begun."""
        logging.info("%s ...", name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
