"""The public functions that take models as a user names them: a folder, a Hub id, an open checkpoint or a source."""

import html as html_lib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from tracing_jax import alignment, checkpoint, experiment, forward, generation, merges, report
from tracing_jax.alignment import Alignment, Evidence
from tracing_jax.data import Documents, load_tokenizer, read_documents, token_blocks
from tracing_jax.dataclass_options import ConfigError, comma_list
from tracing_jax.options import COMPARE, RunOptions
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, ParamSource, in_memory, is_resident, sharded

Model = str | os.PathLike[str] | ParamSource
"""A folder, a Hub id, `org/name@revision` or `demo:<member>`; or a model that is open or loaded already."""

_NO_CHANGES = {
    "base_model_id": "it is the first argument, `base`",
    "ft_model_id": "it is the second argument, `ft`",
    "ft_model_ids": "a report is on one pair; call `trace` for each model",
    "stat": "it is the third argument, `statistics`",
    "save": "call `save` of the report",
}
"""Options that are no `changes` of `trace` -> where they are given."""


@dataclass(frozen=True)
class Report:
    """What the statistics of one pair found; in a notebook it shows as the page that `save` writes.

    Attributes:
      record: the run as plain data: what was asked, what ran, what came out, and what could not be done and why.

    Example:
      >>> found = tj.trace("demo:base", "demo:finetune", "csu")
      >>> found.verdict, found.statistics
      ('related', ('csu',))
      >>> found.log10_p < -100
      True
      >>> found.save(tmp / "csu.p").name  # csu.json, csu.png and csu.html are beside it
      'csu.p'
    """

    record: Mapping[str, Any]
    _outcome: "experiment.ComputedRun" = field(repr=False)

    @property
    def verdict(self) -> str:
        """`identical`, `related`, `no_evidence`, `undecided`, `not_testable` or `not_asked`; see `Verdict`."""
        return str(self.record["verdict"]["verdict"])

    @property
    def meaning(self) -> str:
        """The verdict in words."""
        return str(self.record["verdict"]["meaning"])

    @property
    def log10_p(self) -> float | None:
        """The decimal logarithm of the smallest p-value, Holm-adjusted over the statistics; None if no test applies."""
        found = self.record["verdict"]["adjusted_log10_p"]
        return None if found is None else float(found)

    @property
    def p(self) -> float | None:
        """The same p-value; 0 where a float cannot hold it."""
        return None if self.log10_p is None else float(10**self.log10_p)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics that were asked for."""
        return tuple(self.record["statistics"])

    def __getitem__(self, statistic: str) -> Mapping[str, Any]:
        """Returns the result of a statistic on the pair as given."""
        found: Mapping[str, Any] = self.record["statistics"][statistic]["non_aligned"]
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the pickle, and json, png, html and arrays beside it; returns the path of the pickle.

        Raises:
          ValueError, OSError: the path does not end in .p, .pkl or .pickle, or cannot be written.
        """
        return self._outcome.save(path)

    def __repr__(self) -> str:
        return report.summary([self.record])

    def _repr_html_(self) -> str:
        page = html_lib.escape(report.html(self.record), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:40em;border:0"></iframe>'


def trace(
    base: str | os.PathLike[str] | checkpoint.Checkpoint,
    ft: str | os.PathLike[str] | checkpoint.Checkpoint,
    statistics: str | Sequence[str] | None = None,
    *,
    options: RunOptions = COMPARE,
    **changes: Any,
) -> Report:
    """Returns the report on a pair: was one of the two models made from the other, or both from a common ancestor?

    Args:
      base: a folder, a Hub id, `org/name@revision` or `demo:<member>`; or what `open` returned for one.
      ft: the model that may descend from it, named likewise.
      statistics: names of statistics; by default those of `options`, which need no text.
      options: the options of the run, by default those of `tracing-jax compare`; their models and `save` are not used.
      changes: options by name that differ from these: `dataset="text.txt"`, `align=True`, `seed=1`. Options of a
        statistic are a mapping or its section: `match={"max_tokens": 4096}`.

    Raises:
      ConfigError: options that do not exist or do not fit, all at once, before anything is read.
      FileNotFoundError, CheckpointError, UnsupportedModelError: a model that cannot be read.
      TypeError: a model without files, which a report names.

    Example:
      >>> tj.trace("demo:base", "demo:independent").verdict
      'no_evidence'
      >>> tj.trace("demo:base", "demo:independent", "csu").verdict  # it does not detect a permuted copy
      'undecided'
      >>> tj.trace("demo:base", "demo:disguised", "match", match={"forms": "weights"}).verdict
      'related'
    """
    if lines := [f"{name}: {where}" for name, where in _NO_CHANGES.items() if name in changes]:
        raise ConfigError.of("these options are given elsewhere:", lines)
    statistics = options.stat if statistics is None else statistics
    names = comma_list(statistics) if isinstance(statistics, str) else tuple(statistics)
    asked = options.as_dict() | changes | {"stat": names, "save": None, "ft_model_ids": ()}
    asked |= {"base_model_id": _name_of(base), "ft_model_id": _name_of(ft)}
    outcome = experiment.compute(asked)
    return Report(outcome.record, outcome)


def open(model: str | os.PathLike[str], *, download_dir: str | None = None) -> checkpoint.Checkpoint:
    """Returns an open checkpoint, whose config is read and whose weights are not.

    A model of an unsupported family is read by its weights alone: its `arch.reading` says what was found, and what
    needs a forward pass raises an error.

    Args:
      model: a local folder, a Hub id, `org/name@revision`, or `demo:<member>` (trained on first use).
      download_dir: where downloads are kept; by default where huggingface_hub keeps them.

    Raises:
      FileNotFoundError: there is no such model.
      CheckpointError, UnsupportedModelError: it cannot be read, or its config has something that is not supported.

    Example:
      >>> model = tj.open("demo:base")
      >>> model.arch.family, model.arch.tied
      ('llama', False)
    """
    return checkpoint.open_checkpoint(
        experiment.resolve_model_id(os.fspath(model)), download_dir, weights_only=checkpoint.WeightsOnly()
    )


def load(model: Model, mesh: Mesh | None = None, *, cache_dir: str | None = None) -> InMemory:
    """Returns a model with all its weights on the devices of a mesh, by default on one device, in their own dtype.

    Its `params` are a Flax param pytree `{embed, layers: {"0": ...}, head}` of jax arrays.

    Args:
      model: what `open` takes, an open checkpoint, or a source of rewritten or aligned weights.
      mesh: the devices; see `make_mesh`.
      cache_dir: where the converted weights are kept in Orbax format for the next time.

    Raises:
      CheckpointError: weights are missing, damaged or not finite.
      TypeError: params without the arch that is needed to run them.

    Example:
      >>> model = tj.load("demo:base")
      >>> sorted(model.params["layers"]["0"]["mlp"])
      ['down_proj', 'gate_proj', 'up_proj']
    """
    mesh = make_mesh() if mesh is None else mesh
    if isinstance(model, str | os.PathLike):
        model = open(model)
    if isinstance(model, checkpoint.Checkpoint):
        return checkpoint.load(model, mesh, cache_dir)
    model = _source(model)
    return in_memory(model if is_resident(model) else sharded(model, mesh))


def save(folder: str | os.PathLike[str], model: ParamSource, companions: str | os.PathLike[str]) -> Path:
    """Returns the folder of a checkpoint that transformers can load, after writing it.

    Weights keep the dtype of their leaves. The folder appears whole or not at all.

    Args:
      folder: where to write; it must not exist.
      model: the model, in memory or read as it is written.
      companions: a folder with the config and the tokenizer to copy; the config is changed where the model differs.

    Raises:
      FileExistsError: the folder is there already.
      UnsupportedModelError: the config cannot describe this model.

    Example:
      >>> model = tj.open("demo:finetune")
      >>> folder = tj.save(tmp / "copy", model, companions=model.folder)
      >>> sorted(file.name for file in folder.iterdir())
      ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    """
    checkpoint.save_checkpoint(Path(folder), model, Path(companions))
    return Path(folder)


def tokenize(
    model: Model, text: str | os.PathLike[str], *, block_size: int = 512, num_tokens: int | None = None
) -> Int[np.ndarray, "N T"]:
    r"""Returns a text as blocks of token ids of a model's tokenizer; what does not fill a block is left out.

    Args:
      model: what `open` takes, or an open checkpoint.
      text: the text itself; or the path of a txt, json, jsonl or parquet file, as a `pathlib.Path`.
      block_size: T.
      num_tokens: at most so many tokens.

    Raises:
      FileNotFoundError: no such file, or no tokenizer.
      ValueError: the text does not fill a block.

    Example:
      >>> tj.tokenize("demo:base", "for x in range(10): print(x)\n" * 40, block_size=64).shape[1]
      64
    """
    documents = Documents(text, {"dataset": "a string"}) if isinstance(text, str) else read_documents(os.fspath(text))
    tokenizer = load_tokenizer(_opened(model).tokenizer_folder)
    return token_blocks(documents, tokenizer, block_size=block_size, num_tokens=num_tokens).tokens


def align(
    base: Model, ft: Model, kinds: str | Sequence[str] = ("embed", "mlp"), *, evidence: Evidence = "weights", **how: Any
) -> Alignment:
    """Returns the rewrites that align a fine-tuned model to its base, proven to keep its function.

    Args:
      base: the model that stays.
      ft: the model that moves; it is not changed, see `aligned`.
      kinds: what to undo: `embed`, `mlp`, `kv_heads`, `q_group`, `expert`, `q_latent`, `kv_latent`,
        `state_groups`, `state_heads` (permutations), `rotation`, `gains`, `scaling`, `values`, `queries`, `copies`,
        `padding`, `identity`; or `all`, or `auto`.
      evidence: what units are matched by: `weights`, or `activations` on `tokens` (permutations only). `learned` trains
        the maps on `tokens`, from the alignment by weights.
      how: further arguments of `tracing_jax.alignment.align`: `tokens`, `compute`, `shared`, `seed`, `learning`.

    Raises:
      ValueError: the models cannot be aligned, or the aligned model would compute another function.
      AlignmentError: surplus units or layers of ft are not inactive.

    Example:
      >>> base, ft = tj.load("demo:base"), tj.load("demo:disguised")
      >>> alignment = tj.align(base, ft, ("embed", "mlp", "kv_heads", "q_group"))
      >>> [rewrite.name for rewrite in alignment.rewrites]
      ['permute']
      >>> aligned = tj.aligned(ft, alignment)
    """
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    return alignment.align(load(base), load(ft), kinds, evidence=evidence, **how)


def merge_shares(
    child: str | os.PathLike[str],
    parents: Sequence[str | os.PathLike[str]] = (),
    base: str | os.PathLike[str] | None = None,
    *,
    library: str | os.PathLike[str] | None = None,
    candidates: int = 8,
    align: Sequence[str] = ("auto",),
    seed: int = 0,
    download_dir: str | None = None,
) -> merges.MergeReport:
    """Returns which of these parents a model was merged of, in what shares, with standard errors, layer by layer.

    Args:
      child: the model that may be a merge, named as in `open`.
      parents: the models that may have a part, named likewise.
      base: the model that the parents were made from; without it shares are taken to sum to one over the parents.
      library: of signatures: the child's relatives in it may be parents too; those that explain nothing are left out.
      candidates: so many relatives of a library are read at most, the closest first.
      align: what is undone first where the child is in none of the others' places, as in `align`; empty for nothing.
      seed: every random draw follows from it.
      download_dir: where downloads are kept.

    Raises:
      MergeError: a model given twice, no parents given or found, or nothing to compare.
      FileNotFoundError, CheckpointError, UnsupportedModelError: a model that cannot be read.

    Example:
      >>> found = tj.merge_shares("demo:finetune", ["demo:finetune", "demo:independent"], base="demo:base")
      >>> found.parts
      {'demo:finetune': 'part', 'demo:independent': 'none'}
    """
    return experiment.report_on_merge(
        child,
        parents,
        base,
        library=library,
        candidates=candidates,
        align=align,
        seed=seed,
        download_dir=download_dir,
    )


def path_losses(
    base: Model,
    ft: Model,
    tokens: Int[np.ndarray, "N T"],
    alphas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    groups: Sequence[str] = ("attn", "mlp", "emb"),
    *,
    compute: Compute | None = None,
) -> Float[np.ndarray, "A N T1"]:
    r"""Returns the loss of every predicted token, in nats, at every point of the straight path between two models.

    Args:
      base: the model at alpha 0.
      ft: the model at alpha 1.
      tokens: blocks of base's tokens; see `tokenize`. T1 = T - 1: the first token of a block is not predicted.
      alphas: the points.
      groups: which weights are interpolated, of `attn`, `mlp` and `emb`; the others stay base's. The norms of the
        blocks always are.
      compute: devices, batch size and dtype; by default one device, float32.

    Raises:
      ValueError: models of other shapes, token ids outside base's vocabulary, or no blocks of ids.

    Example:
      >>> tokens = tj.tokenize("demo:base", "def f(x):\n    return x\n" * 60, block_size=64)
      >>> curve = tj.path_losses("demo:base", "demo:finetune", tokens).mean(axis=(1, 2))
      >>> curve.shape, bool(curve[2] < max(curve[0], curve[-1]) + 0.1)  # a fine-tune: no barrier
      ((5,), True)
    """
    compute, tokens = compute or Compute(make_mesh()), _blocks(tokens)
    return forward.path_losses(load(base, compute.mesh), load(ft, compute.mesh), tokens, alphas, groups, compute)


def token_losses(
    model: Model, tokens: Int[np.ndarray, "N T"], *, compute: Compute | None = None
) -> Float[np.ndarray, "N T1"]:
    r"""Returns the loss of every predicted token of one model, in nats; T1 = T - 1.

    Raises:
      ValueError: token ids outside the vocabulary, blocks longer than the model can read, or no blocks of ids.

    Example:
      >>> tokens = tj.tokenize("demo:base", "def f(x):\n    return x\n" * 60, block_size=64)
      >>> perplexity = float(np.exp(tj.token_losses("demo:base", tokens).mean()))
    """
    compute, tokens = compute or Compute(make_mesh()), _blocks(tokens)
    return forward.token_losses(load(model, compute.mesh), tokens, compute)


def logits(model: Model, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
    """Returns the logits of a model on a few blocks of tokens, in float32, on the host.

    Raises:
      ValueError: token ids outside the vocabulary, blocks longer than the model can read, or no blocks of ids.

    Example:
      >>> found = tj.logits("demo:base", np.array([[1, 2, 3]], np.int32))
      >>> found.shape[:2]
      (1, 3)
    """
    tokens = _blocks(tokens)
    return forward.logits(open(model) if isinstance(model, str | os.PathLike) else _source(model), tokens)


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float | int = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    compute: Compute | None = None,
) -> list[str]:
    """Returns the text that a model writes after each prompt.

    Greedy text (`temperature=0`) is that of transformers, token for token.

    Args:
      model: what `open` takes, or an open checkpoint.
      prompts: a list of texts, none of them empty.
      max_new_tokens: the most tokens that follow a prompt.
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: only so many of the most likely tokens are drawn; 0 for all.
      top_p: only the fewest tokens are drawn that together have at least this probability.
      seed: every draw follows from it and from the number of the prompt.
      compute: devices, batch size and dtype; by default one device, float32.

    Raises:
      FileNotFoundError: the model has no tokenizer.
      ValueError: no prompts, or a text in place of the list; an empty prompt; settings out of range, all at once; or
        more text than the model can read.

    Example:
      >>> (text,) = tj.generate("demo:base", ["The for statement"], max_new_tokens=8, temperature=0)
    """
    choice = generation.SamplingParams(float(temperature), top_k, top_p)
    rows = generation.continuations(
        _opened(model), prompts, compute or Compute(make_mesh()), choice, max_new_tokens, seed
    )
    return [row["text"] for row in rows]


def _name_of(model: Any) -> str:
    """Returns the id by which a run opens a model."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    if not isinstance(model, checkpoint.Checkpoint):
        raise TypeError(
            f"a model in memory ({type(model).__name__}) has no files for a report to name; write it with tj.save, and "
            "name the folder"
        )
    name = model.id if model.revision is None or "@" in model.id else f"{model.id}@{model.revision}"
    if open(name).arch != model.arch:
        raise TypeError(f"{name}: this checkpoint is open in part; name the model, and give `max_layers` and the like")
    return name


def _source(model: Any) -> ParamSource:
    if not isinstance(model, ParamSource):
        raise TypeError(
            f"{type(model).__name__}: params without an arch; give tj.InMemory(arch, params), with "
            "the `arch` of the model that they are of, or name a folder"
        )
    return model


def _blocks(tokens: Any) -> Int[np.ndarray, "N T"]:
    if np.ndim(tokens) != 2 or not np.issubdtype(np.asarray(tokens).dtype, np.integer):
        raise ValueError(
            f"tokens: {np.asarray(tokens).dtype} of shape {np.shape(tokens)}; expected whole numbers of the shape "
            "[blocks, tokens of a block], such as tj.tokenize returns"
        )
    return np.asarray(tokens)


def _opened(model: Model) -> checkpoint.Checkpoint:
    if isinstance(model, checkpoint.Checkpoint):
        return model
    if isinstance(model, str | os.PathLike):
        return open(model)
    raise TypeError(f"a model in memory ({type(model).__name__}) has no tokenizer; name its folder, or open it")
