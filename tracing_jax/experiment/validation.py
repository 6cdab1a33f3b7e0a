"""The options of a run: what can be checked before anything is read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from tracing_jax import demo
from tracing_jax.alignment import MAPS, activations_problem, beyond_permutations, expanded, kind_problems
from tracing_jax.arch import Arch
from tracing_jax.axes import PERMUTABLE
from tracing_jax.data import RANDOM, SAMPLE
from tracing_jax.dataclass_options import ConfigError, problems
from tracing_jax.options import RunOptions
from tracing_jax.record import RunFiles, check_writable
from tracing_jax.rewrites import Renaming
from tracing_jax.statistics import (
    AUTO,
    AUTO_BOUNDS,
    AUTO_BY_DEPTH,
    AUTO_BY_EXPERTS,
    AUTO_SMALL,
    AUTO_WITH_TEXT,
    COSTLY,
    LIGHT,
    REGISTRY,
    SMALL_WIDTH,
    Statistic,
    make_statistic,
)
from tracing_jax.statistics.calibration import DEFAULT_ALLOWANCE

DEMO = "demo:"
"""Prefix of model ids that name a member of the demo family."""

RENAMING = Renaming.name
"""The rewrite that a run cannot draw: its tokenizers are those of the files."""

IN_MEMORY = (
    "the gradient of a loss between the models needs all layers of both in memory, so that models are not streamed"
)
"""Why what is trained on such a loss is refused."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Names of the computing dtypes."""


def check_options(options: RunOptions) -> None:
    """Checks every option that can be checked without reading a model.

    Raises:
      ConfigError: all findings, one line each.
    """
    lines = problems(options) or [
        *_model_problems(options),
        *_statistic_problems(options),
        *_training_problems(options),
        *_alignment_problems(options),
        *_disguise_problems(options),
        *_claim_problems(options),
        *_merge_problems(options),
        *_save_problems(options),
    ]
    if lines:
        raise ConfigError.of("the config cannot run:", lines)


def statistic_names(options: RunOptions) -> list[str]:
    """Returns the names of the statistics of a run, each once: those asked for, and those beside them for a verdict."""
    beside = asked_names(replace(options, stat=("auto",))) if has_auto_beside(options) else []
    return list(dict.fromkeys([*asked_names(options), *beside]))


def has_auto_beside(options: RunOptions) -> bool:
    """Returns whether the tests of `auto` decide beside the statistics that are asked for."""
    return options.verdict == "auto" or options.stat == ("merge",)


def asked_names(options: RunOptions) -> list[str]:
    """Returns the names of the statistics that are asked for, each once.

    `all` stands for all statistics but the costly and the light ones. `auto` depends on whether a text is named, and on
    nothing that is found in the models but their depths: the set of tests is fixed before any weight is read.
    """
    with_text: tuple[str, ...] = AUTO_WITH_TEXT if has_text(options) else ()
    stands_for: dict[str, list[str]] = {
        "merge": [],  # a step of its own: it reads more models than the pair
        "all": [name for name in REGISTRY if name not in COSTLY | LIGHT],
        "auto": [name for name in REGISTRY if name in (*AUTO, *with_text, AUTO_BY_DEPTH, AUTO_BY_EXPERTS)],
    }
    return list(dict.fromkeys(n for name in options.stat for n in stands_for.get(name, [name])))


def tests_chosen(options: RunOptions) -> str:
    """Returns who chose the tests of a run, and when, as a clause: what is chosen by its result proves nothing."""
    named = [name for name in options.stat if name not in ("auto", "all", "merge")]
    fixed = "fixed before the models were compared"
    if {"auto", "all"} & set(options.stat) or has_auto_beside(options):
        beside = f", and {', '.join(named)} by name" if named else ""
        return f"{fixed}, by the options and by what each model is without the other{beside}"
    return f"{fixed}: named by the user"


def controls_chosen(options: RunOptions) -> str:
    """Returns which control models there were and who chose them, as a clause."""
    if not options.control_model_ids:
        return f"none: calibrated tests allow for {100 * DEFAULT_ALLOWANCE:g} % of units that agree by convergence"
    return f"chosen by the user: {', '.join(options.control_model_ids)}"


def has_text(options: RunOptions) -> bool:
    """Returns whether the options name a text."""
    return bool(options.dataset or options.dataset_id)


def with_sample_text(options: RunOptions) -> RunOptions:
    """Returns the options with the text of this package, where something reads a text and none is named."""
    if has_text(options) or not text_readers(options, make_statistics(options)):
        return options
    return replace(options, dataset=SAMPLE)


def fitted_to_shapes(
    options: RunOptions, statistics: dict[str, Statistic], base: Arch, ft: Arch
) -> dict[str, Statistic]:
    """Returns the statistics as `auto` runs them on models of these shapes; what is asked for by name stays as it is.

    Without experts there is no need for the statistic that compares every MLP; on wide models the cost of some is
    bounded by `AUTO_BOUNDS`.
    """
    needless = set() if base.num_experts or ft.num_experts else {AUTO_BY_EXPERTS}
    wide = _are_wide(base, ft)
    return {
        name: statistic if is_asked_by_name(options, name) or not wide else _bounded(name, statistic)
        for name, statistic in statistics.items()
        if is_asked_by_name(options, name) or name not in needless
    }


def too_costly(options: RunOptions, statistics: Mapping[str, Statistic], base: Arch, ft: Arch) -> dict[str, str]:
    """Returns why `auto` does not run some of the statistics on models of these shapes."""
    if not _are_wide(base, ft):
        return {}
    reason = (
        f"auto leaves it out for models of more than {SMALL_WIDTH:,} features, since its cost grows with their cube; "
        "name it to run it"
    )
    return {name: reason for name in AUTO_SMALL if name in statistics and not is_asked_by_name(options, name)}


def _are_wide(base: Arch, ft: Arch) -> bool:
    return max(base.embed_dim, ft.embed_dim) > SMALL_WIDTH


def _bounded(name: str, statistic: Statistic) -> Statistic:
    """Returns a statistic with the bounds of `auto`, but for options that have another value than their default."""
    default = REGISTRY[name]()
    bounds = {
        option: bound
        for option, bound in AUTO_BOUNDS.get(name, {}).items()
        if getattr(statistic, option) == getattr(default, option)
    }
    return replace(statistic, **bounds) if bounds else statistic  # type: ignore[type-var]


def is_asked_by_name(options: RunOptions, name: str) -> bool:
    """Returns whether a statistic is asked for by its name or by `all`, and not for the sake of a verdict alone."""
    return name in (REGISTRY if "all" in options.stat else options.stat)


def with_fitting_blocks(options: RunOptions, base: Arch, ft: Arch) -> tuple[RunOptions, list[str]]:
    """Returns the options with default block sizes that both models can read, and notes on those that were changed."""
    most = min((arch.longest for arch in (base, ft) if arch.longest is not None), default=None)
    if most is None:
        return options, []
    changed, notes, default = options, [], RunOptions()
    if options.block_size == default.block_size > most:
        changed = replace(changed, block_size=most, num_tokens=max(options.num_tokens, most))
        notes.append(f"block_size: {most}, which is as many positions as the models have, not {default.block_size}")
    if options.csh.block_size == default.csh.block_size > most:
        changed = replace(changed, csh=replace(options.csh, block_size=most))
        if "csh" in statistic_names(options):
            notes.append(f"csh.block_size: {most}, which is as many positions as the models have")
    return changed, notes


def both_have_forward_pass(base: Arch, ft: Arch) -> bool:
    """Returns whether neither model is read by its weights alone."""
    return base.reading is None and ft.reading is None


def make_statistics(options: RunOptions, with_forward_pass: bool = True) -> dict[str, Statistic]:
    """Returns the statistics of a run by name, without forms that read a text which is not named, or what is not known.

    Args:
      options: of the run.
      with_forward_pass: whether both models have one that is known, and heads.
    """
    if not with_forward_pass:
        forms = tuple(form for form in options.match_moments.forms if form != "layer") or ("model",)
        options = replace(options, match_moments=replace(options.match_moments, forms=forms))
    if not (with_forward_pass and has_text(options)):
        weights = tuple(form for form in options.match.forms if form != "forward") or options.match.forms
        weights_all = tuple(form for form in options.match_all.forms if form != "forward") or options.match_all.forms
        options = replace(
            options,
            match=replace(options.match, forms=weights),
            match_all=replace(options.match_all, forms=weights_all),
        )
    return {name: make_statistic(name, options) for name in statistic_names(options)}


def trains_a_curve(options: RunOptions) -> bool:
    """Returns whether a curve between the models is asked for whose middle point is trained."""
    return options.mode.path == "bezier" and "mode" in statistic_names(options)


def text_readers(options: RunOptions, statistics: Mapping[str, Statistic]) -> list[str]:
    """Returns what of a run reads text, by the name of its option."""
    other = {"eval": options.eval}
    if options.align:
        other["align_evidence=activations"] = options.align_evidence == "activations"
        other["align_evidence=learned"] = options.align_evidence == "learned" and not options.learned.dataset
    return [name for name, statistic in statistics.items() if statistic.needs_tokens] + [n for n in other if other[n]]


def _model_problems(options: RunOptions) -> list[str]:
    asked = {"base_model_id": options.base_model_id, "ft_model_id": options.ft_model_id}
    if options.ft_model_ids:
        if asked.pop("ft_model_id"):
            both = f"ft_model_id={options.ft_model_id} and ft_model_ids={','.join(options.ft_model_ids)}"
            return [f"both {both} are set; leave one out"]
        asked |= {f"ft_model_ids[{i}]": model_id for i, model_id in enumerate(options.ft_model_ids)}
    lines = []
    for name, model_id in asked.items():
        if not model_id:
            lines.append(f"{name} is not set: a local folder, a Hub id, or demo:<{'|'.join(demo.MEMBERS)}>")
        elif model_id.startswith(DEMO) and not demo.is_member(model_id.removeprefix(DEMO)):
            lines.append(f"{name}={model_id}: the demo has {', '.join((*demo.MEMBERS, *demo.TREE))}")
    return lines


def _statistic_problems(options: RunOptions) -> list[str]:
    if not options.stat:
        return [f"no statistic is asked for; there are {', '.join(REGISTRY)}, or all"]
    lines = [f"{name}.forms is empty: forward, weights or both" for name in ("match", "match_all")
             if not getattr(options, name).forms]  # fmt: skip
    if options.num_tokens < options.block_size:
        lines.append(f"num_tokens={options.num_tokens}: at least {options.block_size}, which is block_size")
    elif options.mode.calibrate and "mode" in asked_names(options) and options.num_tokens < 2 * options.block_size:
        lines.append(
            f"mode.calibrate: num_tokens={options.num_tokens} is one block, expected two or more to fit on one"
        )
    return lines


def _training_problems(options: RunOptions) -> list[str]:
    """Returns why what is trained on a loss between the models cannot be."""
    learns = options.align and options.align_evidence == "learned"
    asked = {"mode.path=bezier": "mode.path=linear"} if trains_a_curve(options) else {}
    asked |= {"align_evidence=learned": "align_evidence=weights"} if learns else {}
    lines = []
    if options.memory == "stream":
        lines += [f"{name}: {IN_MEMORY}; set memory=resident, or {other}" for name, other in asked.items()]
    if (options.learned.dataset or options.dataset) == RANDOM:
        lines += [f"{name}: {RANDOM} tokens teach nothing; set learned.dataset to a text" for name in asked]
    return lines


def _alignment_problems(options: RunOptions) -> list[str]:
    kinds, shown = options.align_axes, ",".join(options.align_axes)
    lines = [f"align_axes={shown}: {line}" for line in kind_problems(kinds) if kinds or options.align]
    beyond = beyond_permutations(kinds)
    if options.align_evidence == "activations" and (problem := activations_problem(kinds)):
        lines.append(f"align_axes={problem}")
    if options.align and options.align_evidence == "learned":
        if not set(expanded(kinds)) & MAPS.keys():
            some = f"set align_axes=all, or name some of {', '.join(MAPS)}"
            lines.append(f"align_axes={shown}: nothing of it can be learned; {some}")
    elif options.memory == "stream" and options.align and beyond:
        lines.append(
            f"align_axes={shown}: {', '.join(beyond)} need both models in memory; set memory=resident, or choose from "
            f"{', '.join(PERMUTABLE)}"
        )
    return lines + _saving_problems(options)


def base_folder(folder: str) -> str:
    """Returns where base is written, if it is mapped as well as the model that is written to this folder."""
    return f"{folder.rstrip('/')}-base"


def _saving_problems(options: RunOptions) -> list[str]:
    lines, folder = [], options.save_aligned
    if folder and not options.align:
        lines.append(f"save_aligned={folder}: nothing is aligned; set align")
    if folder and jax.process_count() > 1:
        lines.append(f"save_aligned={folder}: one process alone can write a checkpoint; start only one")
    written = [folder] if folder else []
    if folder and options.align_evidence == "learned" and options.learned.ends == "both":
        written.append(base_folder(folder))
    for path in written:
        if Path(path).expanduser().exists():
            lines.append(f"save_aligned={folder}: {path} is there already; remove it or choose another folder")
    return lines


def _disguise_problems(options: RunOptions) -> list[str]:
    names, shown = options.disguise, ",".join(options.disguise)
    lines = []
    if options.permute and not options.permute_axes:
        lines.append(f"permute is set and permute_axes is empty; choose from {', '.join(PERMUTABLE)}")
    if options.max_layers and names:
        lines.append("max_layers compares the first layers as they are; leave disguise out, or trace the whole model")
    if "all" in names and len(names) > 1:
        lines.append(f"disguise={shown}: all cannot be combined with other names")
    if RENAMING in names:
        lines.append(
            f"disguise={shown}: {RENAMING} changes the tokenizer's files too; write a checkpoint with "
            f"`tracing-jax disguise MODEL --disguise={shown} ...` and trace that"
        )
    return lines


def _claim_problems(options: RunOptions) -> list[str]:
    if not options.claim:
        return []
    asked = {"permute": options.permute, "disguise": options.disguise, "max_layers": options.max_layers}
    return [
        f"claim={options.claim}: it is about the models as they are in their files; leave {name} out"
        for name, value in asked.items()
        if value
    ]


def _merge_problems(options: RunOptions) -> list[str]:
    given = options.merge.parents or options.merge.base
    if "merge" not in options.stat:
        return ["merge.parents and merge.base are read by stat=merge; add merge to stat"] if given else []
    if not given:
        return ["stat=merge: base alone has no share to estimate; name other models with merge.parents, or merge.base"]
    asked = {"permute": options.permute, "disguise": options.disguise, "max_layers": options.max_layers,
             "component": options.component}  # fmt: skip
    return [f"stat=merge: it reads models as they are in their files; leave {name} out" for name, value in asked.items()
            if value]  # fmt: skip


def _save_problems(options: RunOptions) -> list[str]:
    if options.save is None:
        return ["save is not set: several fine-tuned models are compared in files"] if options.ft_model_ids else []
    try:
        files = RunFiles.from_save(options.save)
        for file in (files.pickle, files.json, files.png, files.html):
            check_writable(file)
        if files.folder.exists() and not files.folder.is_dir():
            raise NotADirectoryError(
                f"cannot save to {files.folder}: it is a file, expected a folder; choose another save"
            )
    except (OSError, ValueError) as error:
        return [str(error)]
    return []
