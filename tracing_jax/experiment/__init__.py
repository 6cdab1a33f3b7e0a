"""The seven steps of a run: load, permute, statistic, align, statistic, perplexity, save. Config -> record -> files."""

import contextlib
import io
import pickle
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tracing_jax.alignment import Alignment, AlignmentError, align, aligned, kinds_in
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import load
from tracing_jax.data import TokenBlocks
from tracing_jax.experiment.facts import alignment_facts, device_facts, model_facts, shape_facts, token_facts, versions
from tracing_jax.experiment.opening import Opened, inapplicable, open_pair
from tracing_jax.experiment.settings import DEMO, DTYPES, ConfigError, check_config, names_in
from tracing_jax.forward import check_function, token_losses
from tracing_jax.record import FORMAT, RunFiles, atomic_write, commit, legacy_dict, plain, write_json, write_pickle
from tracing_jax.report import family_html, figure_of_family, figure_of_run, html, save_png
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.source import InMemory, disguised, in_memory, permute_in_place, placed
from tracing_jax.statistics import Pair, Result, over_pairs, verdict
from tracing_jax.symmetry import Untying, random_permutations, share_moved

__all__ = ["ConfigError", "run", "save", "trace"]


def run(config: ConfigDict) -> list[dict[str, Any]]:
    """Runs a config and returns its records: one for a pair, one per model where `ft_model_ids` names several.

    Raises:
      ConfigError: before anything is read; then the errors of reading checkpoints and text, before anything heavy.
    """
    check_config(config)
    if "ft_model_ids" not in config:
        return [trace(config)]
    files = RunFiles.from_save(config.save)
    pairs = _pairs(config, files)
    for pair in pairs.values():
        open_pair(pair)  # whatever is wrong with the last pair is said before the first is traced
    traced = {name: trace(pair) for name, pair in pairs.items()}
    records = dict(zip(traced, _side_by_side(list(traced.values()))))
    write_json(files.json, {"format": FORMAT, "records": list(records.values())})
    atomic_write(
        files.pickle, pickle.dumps({name: legacy_dict(record) for name, record in records.items()}, protocol=4)
    )
    save_png(figure_of_family(list(records.values())), files.png)
    pages = [urllib.parse.quote(f"{files.folder.name}/{name}.html") for name in records]
    atomic_write(files.html, family_html(list(records.values()), pages).encode())
    logging.info("wrote %s, json, png and html; each pair lies in %s", files.pickle, files.folder)
    return list(records.values())


def _side_by_side(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records with `over_pairs_log10_p` in the verdict: its p-value adjusted over the pairs as well."""
    adjusted = over_pairs([record["verdict"]["adjusted_log10_p"] for record in records])
    return [
        {**record, "verdict": {**record["verdict"], "over_pairs_log10_p": log10_p}}
        for record, log10_p in zip(records, adjusted)
    ]


def _pairs(config: ConfigDict, files: RunFiles) -> dict[str, ConfigDict]:
    """Returns the config of each pair by a name that is its own, saved in the folder of the run."""
    pairs: dict[str, ConfigDict] = {}
    for model_id in config.ft_model_ids:
        name = model_id.removeprefix(DEMO).rstrip("/").split("/")[-1]
        if name in pairs:
            name = f"{name}-{len(pairs) + 1}"
        pairs[name] = ConfigDict({key: value for key, value in config.items() if key != "ft_model_ids"})
        pairs[name].ft_model_id, pairs[name].save = model_id, str(files.folder / f"{name}.p")
    return pairs


def trace(config: ConfigDict) -> dict[str, Any]:
    """Runs the seven steps on one pair, writes the files of the run, and returns its record."""
    check_config(config)
    clock = _Clock()
    with clock.step("open"):
        opened = open_pair(config)
    with clock.step("load"):
        pair = _load(config, opened)
    with clock.step("hashes"):  # now, while the files are still in the page cache
        models = {name: model_facts(checkpoint) for name, checkpoint in opened.models().items()}
    disguise = permutation = alignment = perplexity = None
    if opened.rewrites:
        with clock.step("disguise"):
            disguise = _prove_disguise(config, opened, pair)
    if config.permute:
        with clock.step("permute"):
            permutation = _permute(config, pair)
    with clock.step("statistic"):
        before = _compute(opened, pair, opened.not_applicable)
    judged = verdict(before, config.level)
    after: dict[str, Result] = {}
    if config.align and not opened.not_alignable:
        with clock.step("align"):
            pair, alignment = _align(config, opened, pair)
    if alignment is not None:
        with clock.step("statistic aligned"):
            reasons = inapplicable(opened.statistics, pair.base.arch, pair.ft.arch, opened.vocabularies)
            after = _compute(opened, pair, reasons)
    if config.eval:
        with clock.step("perplexity"):
            perplexity = {
                "base": _perplexity(pair, pair.base, opened.blocks_base, "base"),
                "ft": _perplexity(pair, pair.ft, opened.blocks_ft, "ft"),
            }
    record = plain(
        {
            "format": FORMAT,
            "args": config.to_dict(),
            "commit": commit(),
            "versions": versions(),
            "device": device_facts(pair.compute.mesh),
            "seed": config.seed,
            "models": models,
            "tokens": token_facts(opened),
            "disguised": disguise,
            "permuted": permutation,
            "alignment": None if alignment is None else alignment_facts(alignment),
            "statistics": {
                name: {"non_aligned": before[name].as_dict(), "aligned": after[name].as_dict() if after else None}
                for name in before
            },
            "verdict": judged.as_dict(),
            "perplexity": perplexity,
            "seconds": clock.seconds,
            "notes": opened.notes,
        }
    )
    arrays = {name: result.arrays for name, result in before.items() if result.arrays}
    save(record, RunFiles.from_save(config.save), alignment, arrays)
    return record


def save(
    record: dict[str, Any],
    files: RunFiles,
    alignment: Alignment | None = None,
    arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Writes the files of one run, each whole or not at all; arrays go into its folder."""
    write_json(files.json, record)
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
    logging.info("wrote %s and, beside it, json, png and html", files.pickle)


def _load(config: ConfigDict, opened: Opened) -> Pair:
    """Step 1: both models on the mesh; a disguise changes the parts of ft as they are read, so that no copy lives."""
    mesh = make_mesh(config.mesh.data, config.mesh.model)
    base = load(opened.base, mesh, config.cache_dir)
    if opened.rewrites:
        ft = in_memory(placed(disguised(opened.ft, opened.rewrites), mesh), f"disguising {opened.ft.id}")
    else:
        ft = load(opened.ft, mesh, config.cache_dir)
    tokens = None if opened.blocks_base is None else opened.blocks_base.tokens
    compute = Compute(mesh, config.batch_size, DTYPES[config.dtype])
    return Pair(
        base, ft, opened.vocabularies, tokens, compute, config.seed, blocks=opened.paired, controls=opened.controls
    )


def _prove_disguise(config: ConfigDict, opened: Opened, pair: Pair) -> dict[str, Any]:
    """Step 2: what was rewritten, and how far the logits of the model in the files are from those of the disguised."""
    moved = check_function(opened.ft, pair.ft, seed=config.seed)
    names = [rewrite.name for rewrite in opened.rewrites]
    return {"rewrites": names, "seed": config.seed, "logits_moved": moved, "shape": shape_facts(pair.ft.arch)}


def _permute(config: ConfigDict, pair: Pair) -> dict[str, Any]:
    """Step 2: the fine-tuned model's own weights, its units in a random order."""
    axes = names_in(config.permute_axes)
    permutations = random_permutations(jax.random.key(config.seed), axis_table(pair.ft.arch), axes)
    facts = {"axes": axes, "seed": config.seed, "share_moved": share_moved(permutations)}
    permute_in_place(pair.ft, permutations)
    return facts


def _compute(opened: Opened, pair: Pair, not_applicable: Mapping[str, str]) -> dict[str, Result]:
    """Steps 3 and 5: every statistic that applies; of the others the reason."""
    results = {}
    for name, statistic in opened.statistics.items():
        if reason := not_applicable.get(name):
            results[name] = Result(None, name, not_applicable=reason)
        else:
            results[name] = statistic.compute(pair)
    return results


def _align(config: ConfigDict, opened: Opened, pair: Pair) -> tuple[Pair, Alignment | None]:
    """Step 4: the fine-tuned model in base's place. None, and a note, where its weights turn out not to allow it."""
    shared = None
    # Embeddings padded to different sizes differ in their rows even under one tokenizer.
    if opened.vocabularies.known and not (
        opened.vocabularies.same and pair.base.arch.vocab_size == pair.ft.arch.vocab_size
    ):
        shared = {"vocab": (opened.vocabularies.ids_base, opened.vocabularies.ids_ft)}
    kinds, evidence = kinds_in(config.align_axes), config.align_evidence
    how = {"compute": pair.compute, "shared": shared, "seed": config.seed}
    try:
        alignment = align(pair.base, pair.ft, kinds, evidence=evidence, tokens=pair.tokens, **how)
    except AlignmentError as error:
        opened.notes.append(f"not aligned: {error}")
        return pair, None
    if not alignment.rewrites:
        permute_in_place(pair.ft, alignment.permutations)
        return replace(pair, aligned=True), alignment
    ft = in_memory(placed(aligned(pair.ft, alignment), pair.compute.mesh), "aligning")
    base = pair.base
    if base.arch.tied and not ft.arch.tied:
        base = _untied(base, pair.compute.mesh)
        opened.notes.append(
            "aligned, ft has a head of its own; base's was untied from its embedding for that, unchanged"
        )
    return replace(pair, base=base, ft=ft, aligned=True), alignment


def _untied(model: InMemory, mesh: Mesh) -> InMemory:
    """Returns the model with a head of its own, equal to its embedding; the other weights are shared with it."""
    untied = placed(disguised(model, [Untying()]), mesh)
    return InMemory(untied.arch, {**model.params, "head": untied.head()})


def _perplexity(pair: Pair, model: InMemory, blocks: TokenBlocks | None, side: str) -> dict[str, float]:
    """Step 6: perplexity of one model on its own tokens of the text, per token and per byte."""
    assert blocks is not None
    losses = token_losses(model, blocks.tokens, pair.compute, description=f"perplexity of {side}")
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
