"""The seven steps of a run: load, permute, statistic, align, statistic, perplexity, save. Config -> record -> files."""

import contextlib
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from tracing_jax import demo
from tracing_jax.alignment import Alignment, align
from tracing_jax.axes import PERMUTABLE, axis_table
from tracing_jax.checkpoint import Checkpoint, load, open_checkpoint
from tracing_jax.data import (
    Documents,
    TokenBlocks,
    load_tokenizer,
    read_documents,
    same_tokenizer,
    shared_tokens,
    token_blocks,
)
from tracing_jax.forward import token_losses
from tracing_jax.record import (
    FORMAT,
    RunFiles,
    atomic_write,
    check_writable,
    commit,
    file_hashes,
    plain,
    write_json,
    write_pickle,
)
from tracing_jax.report import figure_of_family, figure_of_run, html, save_png
from tracing_jax.sharding import make_mesh
from tracing_jax.source import InMemory, in_memory, permuted
from tracing_jax.statistics import REGISTRY, Pair, Result, Statistic, Vocabularies
from tracing_jax.symmetry import random_permutations, share_moved

_DEMO = "demo:"
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class ConfigError(ValueError):
    """The config of a run asks for something that does not exist or does not fit; all findings at once."""


def run(config: ConfigDict) -> list[dict[str, Any]]:
    """Runs a config and returns its records: one for a pair, one per candidate where `ft_model_ids` names several.

    Raises:
      ConfigError: before anything is read; then the errors of reading checkpoints and text, before anything heavy.
    """
    if "ft_model_ids" not in config:
        return [trace(config)]
    check_config(config)
    files = RunFiles.from_save(config.save)
    records = []
    for model_id in config.ft_model_ids:
        name = model_id.removeprefix(_DEMO).rstrip("/").split("/")[-1]
        one = ConfigDict({k: v for k, v in config.items() if k != "ft_model_ids"})
        one.ft_model_id, one.save = model_id, str(files.folder / f"{name}.p")
        records.append(trace(one))
    write_json(files.json, {"format": FORMAT, "records": records})
    save_png(figure_of_family(records), files.png)
    return records


def trace(config: ConfigDict) -> dict[str, Any]:
    """Runs the seven steps on one pair, writes the files of the run, and returns its record."""
    check_config(config)
    clock = _Clock()
    with clock.step("open"):
        opened = _open(config)
    with clock.step("load"):
        pair = _load(config, opened)
    permutation = None
    if config.permute:
        with clock.step("permute"):
            pair, permutation = _permute(config, pair)
    with clock.step("statistic"):
        before = _compute(opened, pair)
    alignment, after = None, {}
    if config.align:
        with clock.step("align"):
            pair, alignment = _align(config, opened, pair)
        with clock.step("statistic aligned"):
            after = _compute(opened, pair)
    perplexity = None
    if config.eval:
        with clock.step("perplexity"):
            perplexity = {"base": _perplexity(pair, pair.base, opened.blocks_base, "base"),
                          "ft": _perplexity(pair, pair.ft, opened.blocks_ft, "ft")}  # fmt: skip
    with clock.step("hashes"):
        models = {side: _model_facts(opened, side) for side in ("base", "ft")}
    record = plain(
        {
            "format": FORMAT,
            "args": config.to_dict(),
            "commit": commit(),
            "versions": _versions(),
            "device": _device(pair),
            "seed": config.seed,
            "models": models,
            "tokens": _token_facts(opened),
            "permuted": permutation,
            "alignment": None if alignment is None else _alignment_facts(config, alignment),
            "statistics": {
                name: {"non_aligned": before[name].as_dict(), "aligned": after[name].as_dict() if after else None}
                for name in opened.statistics
            },
            "perplexity": perplexity,
            "seconds": clock.seconds,
            "notes": opened.notes,
        }
    )
    save(record, RunFiles.from_save(config.save))
    return record


def save(record: dict[str, Any], files: RunFiles) -> None:
    """Writes the pickle, the JSON, the figure and the page of one run, each whole or not at all."""
    files.pickle.parent.mkdir(parents=True, exist_ok=True)
    write_json(files.json, record)
    save_png(figure_of_run(record), files.png)
    atomic_write(files.html, html(record).encode())
    write_pickle(files.pickle, record)  # last: whoever finds it finds the rest beside it
    logging.info("wrote %s and, beside it, json, png and html", files.pickle)


def check_config(config: ConfigDict) -> None:
    """Checks every field that can be checked without reading a model.

    Raises:
      ConfigError: all findings, one line each.
    """
    lines = []
    for side in ("base_model_id",) + (() if "ft_model_ids" in config else ("ft_model_id",)):
        if not config[side]:
            lines.append(f"{side} is not set: a local folder, a Hub id, or demo:<{'|'.join(demo.MEMBERS)}>")
        elif config[side].startswith(_DEMO) and config[side].removeprefix(_DEMO) not in demo.MEMBERS:
            lines.append(f"{side}={config[side]}: the demo family has {', '.join(demo.MEMBERS)}")
    if unknown := [name for name in _names(config.stat) if name not in REGISTRY]:
        lines.append(f"unknown statistic {', '.join(unknown)}; there are {', '.join(REGISTRY)}, or all")
    for name in ("permute_axes", "align_axes"):
        if unknown := [axis for axis in _names(config[name]) if axis not in PERMUTABLE]:
            lines.append(f"{name}: unknown axes {', '.join(unknown)}; there are {', '.join(PERMUTABLE)}")
    if config.align_evidence not in ("weights", "activations"):
        lines.append(f"align_evidence={config.align_evidence}: it is weights or activations")
    if config.dtype not in _DTYPES:
        lines.append(f"dtype={config.dtype}: it is one of {', '.join(_DTYPES)}")
    if outside := [alpha for alpha in config.alphas if not 0 <= alpha <= 1]:
        lines.append(f"alphas {outside} are outside 0..1")
    for name, least in (("block_size", 2), ("batch_size", 1), ("num_tokens", 2)):
        if config[name] < least:
            lines.append(f"{name}={config[name]}: at least {least}")
    try:
        check_writable(RunFiles.from_save(config.save).pickle)
    except (OSError, ValueError) as error:
        lines.append(str(error))
    if lines:
        raise ConfigError("\n  ".join(["the config cannot run:", *lines]) if len(lines) > 1 else lines[0])


@dataclass(frozen=True)
class _Opened:
    """A pair that is open but not loaded, with everything that could be checked before loading."""

    base: Checkpoint
    ft: Checkpoint
    statistics: dict[str, Statistic]
    not_applicable: dict[str, str]
    vocabularies: Vocabularies
    blocks_base: TokenBlocks | None
    blocks_ft: TokenBlocks | None
    notes: list[str]


@dataclass
class _Clock:
    """Seconds per step of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measures one step and says on the log that it has begun."""
        logging.info("%s ...", name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _open(config: ConfigDict) -> _Opened:
    """Opens both checkpoints and the text, and asks every statistic whether it applies."""
    base, ft = (open_checkpoint(_resolved(config[side])) for side in ("base_model_id", "ft_model_id"))
    statistics = {name: REGISTRY[name](config) for name in _names(config.stat)}
    activations = config.align and config.align_evidence == "activations"
    needs_tokens = config.eval or activations or any(statistic.needs_tokens for statistic in statistics.values())
    tokenizer_base, tokenizer_ft = (_tokenizer(checkpoint, needs_tokens) for checkpoint in (base, ft))
    vocabularies = _vocabularies(base, ft, tokenizer_base, tokenizer_ft)
    problems = {
        name: "; ".join(statistic.problems(base.arch, ft.arch, vocabularies)) for name, statistic in statistics.items()
    }
    not_applicable = {name: problem for name, problem in problems.items() if problem}
    if len(not_applicable) == len(statistics):
        lines = [f"{name}: {problem}" for name, problem in not_applicable.items()]
        raise ConfigError(f"{base.id} and {ft.id} cannot be compared: " + "\n  ".join(lines))
    if activations and not vocabularies.same:
        raise ConfigError("align_evidence=activations needs one tokenizer for both models; use weights")
    blocks_base = blocks_ft = None
    if needs_tokens:
        blocks_base, blocks_ft = _blocks(config, tokenizer_base, tokenizer_ft, vocabularies.same)
    return _Opened(
        base, ft, statistics, not_applicable, vocabularies, blocks_base, blocks_ft, _notes(base, ft, vocabularies)
    )


def _resolved(model_id: str) -> str:
    """Returns the folder of a member of the demo family, training it if need be; any other id as it is."""
    if not model_id.startswith(_DEMO):
        return model_id
    return str(demo.family().member(model_id.removeprefix(_DEMO)))


def _names(listed: str) -> list[str]:
    names = [name.strip() for name in listed.split(",") if name.strip()]
    return list(REGISTRY) if names == ["all"] else names


def _tokenizer(checkpoint: Checkpoint, needed: bool) -> Any:
    try:
        return load_tokenizer(checkpoint.tokenizer_folder)
    except FileNotFoundError:
        if needed:
            raise
        return None


def _vocabularies(base: Checkpoint, ft: Checkpoint, tokenizer_base: Any, tokenizer_ft: Any) -> Vocabularies:
    """Returns how the tokens correspond, among those that both models have an embedding for."""
    if tokenizer_base is None or tokenizer_ft is None:
        return Vocabularies(False, np.zeros(0, np.int32), np.zeros(0, np.int32))
    ids_base, ids_ft = shared_tokens(tokenizer_base, tokenizer_ft)
    known = (ids_base < base.arch.vocab_size) & (ids_ft < ft.arch.vocab_size)
    same = base.arch.vocab_size == ft.arch.vocab_size and same_tokenizer(tokenizer_base, tokenizer_ft)
    return Vocabularies(same, ids_base[known], ids_ft[known])


def _blocks(config: ConfigDict, tokenizer_base: Any, tokenizer_ft: Any, same: bool) -> tuple[TokenBlocks, TokenBlocks]:
    """Returns the text as base's tokens, and the very same text as ft's."""
    documents = _documents(config)
    blocks = token_blocks(documents, tokenizer_base, block_size=config.block_size, num_tokens=config.num_tokens)
    if same:
        return blocks, blocks
    return blocks, token_blocks(documents.prefix(blocks.text_chars), tokenizer_ft, block_size=config.block_size)


def _documents(config: ConfigDict) -> Documents:
    if config.dataset == "demo" and not config.dataset_id:
        return read_documents(str(demo.family().text))
    return read_documents(
        config.dataset_id or config.dataset,
        subset=config.dataset_subset,
        split=config.dataset_split,
        text_column=config.text_column,
    )


def _notes(base: Checkpoint, ft: Checkpoint, vocabularies: Vocabularies) -> list[str]:
    notes = []
    if not vocabularies.same:
        notes.append(
            f"different tokenizers ({len(vocabularies.ids_base)} tokens shared): each model's perplexity is on its own "
            "tokens of the same text, so compare it per byte; the path runs on base's tokens, embedding and head"
        )
    facts = ("rope_frequencies", "norm_eps", "layer_windows", "attention_scale", "embed_scale", "residual_scale")
    if different := [name for name in facts if getattr(base.arch, name) != getattr(ft.arch, name)]:
        notes.append(f"the models differ in {', '.join(different)}: along the path base's are used")
    return notes


def _load(config: ConfigDict, opened: _Opened) -> Pair:
    """Step 1: both models on the mesh."""
    mesh = make_mesh(config.mesh.data, config.mesh.model)
    base, ft = (load(checkpoint, mesh, config.cache_dir) for checkpoint in (opened.base, opened.ft))
    tokens = None if opened.blocks_base is None else opened.blocks_base.tokens
    return Pair(
        base, ft, opened.vocabularies, tokens, mesh, config.batch_size, _DTYPES[config.dtype], config.seed
    )  # fmt: skip


def _permute(config: ConfigDict, pair: Pair) -> tuple[Pair, dict[str, Any]]:
    """Step 2: the fine-tuned model's own weights, its units renamed at random."""
    axes = _names(config.permute_axes)
    permutations = random_permutations(jax.random.key(config.seed), axis_table(pair.ft.arch), axes)
    facts = {"axes": axes, "seed": config.seed, "share_moved": share_moved(permutations)}
    return _with_ft(pair, in_memory(permuted(pair.ft, permutations)), aligned=False), facts


def _compute(opened: _Opened, pair: Pair) -> dict[str, Result]:
    """Steps 3 and 5: every statistic that applies; of the others the reason."""
    results = {}
    for name, statistic in opened.statistics.items():
        if name in opened.not_applicable:
            results[name] = Result(None, name, not_applicable=opened.not_applicable[name])
        else:
            results[name] = statistic.compute(pair)
    return results


def _align(config: ConfigDict, opened: _Opened, pair: Pair) -> tuple[Pair, Alignment]:
    """Step 4: the fine-tuned model's units in base's order."""
    alignment = align(
        pair.base,
        pair.ft,
        _names(config.align_axes),
        evidence=config.align_evidence,
        tokens=pair.tokens,
        mesh=pair.mesh,
        batch_size=pair.batch_size,
        shared={"vocab": (opened.vocabularies.ids_base, opened.vocabularies.ids_ft)},
    )
    return _with_ft(pair, in_memory(permuted(pair.ft, alignment.permutations)), aligned=True), alignment


def _with_ft(pair: Pair, ft: InMemory, aligned: bool) -> Pair:
    return Pair(**{**{name: getattr(pair, name) for name in Pair.__dataclass_fields__}, "ft": ft, "aligned": aligned})


def _perplexity(pair: Pair, model: InMemory, blocks: TokenBlocks | None, side: str) -> dict[str, float]:
    """Step 6: perplexity of one model on its own tokens of the text, per token and per byte."""
    assert blocks is not None
    losses = token_losses(
        model, blocks.tokens, mesh=pair.mesh, batch_size=pair.batch_size, dtype=pair.dtype,
        description=f"perplexity of {side}",
    )  # fmt: skip
    nats, num_bytes = float(losses.sum(dtype=np.float64)), int(blocks.num_bytes.sum())
    return {
        "loss_nats_per_token": nats / losses.size,
        "perplexity": float(np.exp(nats / losses.size)),
        "nats_per_byte": nats / num_bytes,
        "perplexity_per_byte": float(np.exp(nats / num_bytes)),
        "tokens": losses.size,
        "bytes": num_bytes,
    }


def _model_facts(opened: _Opened, side: str) -> dict[str, Any]:
    checkpoint: Checkpoint = getattr(opened, side)
    arch = checkpoint.arch
    shape = {name: getattr(arch, name) for name in
             ("num_layers", "embed_dim", "mlp_dim", "num_kv_heads", "q_group", "head_dim", "vocab_size", "tied")}  # fmt: skip
    return {
        "id": checkpoint.id,
        "revision": checkpoint.revision,
        "family": arch.family,
        "parameters": sum(int(np.prod(entry.shape)) for entry in checkpoint.entries.values()),
        "shape": shape,
        "files": file_hashes([checkpoint.folder / "config.json", *checkpoint.tensors.files()]),
    }


def _token_facts(opened: _Opened) -> dict[str, Any] | None:
    blocks = opened.blocks_base
    if blocks is None:
        return None
    facts = {"num_tokens": int(blocks.tokens.size), "num_blocks": len(blocks.tokens), "sha256": blocks.sha256}
    facts |= {"bytes": int(blocks.num_bytes.sum()), "same_tokenizer": opened.vocabularies.same}
    return dict(blocks.source) | facts | {"shared_tokens": len(opened.vocabularies.ids_base)}


def _alignment_facts(config: ConfigDict, alignment: Alignment) -> dict[str, Any]:
    facts = {name: value for name, value in asdict(alignment).items() if name != "permutations"}
    return {"axes": _names(config.align_axes), **facts}


def _versions() -> dict[str, str]:
    packages = ("tracing_jax", "jax", "flax", "numpy", "transformers")
    return {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}


def _device(pair: Pair) -> dict[str, Any]:
    device = pair.mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": pair.mesh.size,
        "mesh": dict(pair.mesh.shape),
    }
