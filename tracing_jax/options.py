"""Every option of a run: its type, default, meaning and range, declared here and nowhere else.

`RunOptions` holds the general options; each statistic has a section of its own name. Command lines, config files, the
record of a run and the statistics themselves are made from these dataclasses. Nothing heavy is imported here, so that
`--help` answers at once.
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tracing_jax.dataclass_options import from_mapping, option, options_of, sections_of, suggestion

PERMUTABLE = (
    "embed", "mlp", "kv_heads", "q_group", "expert", "q_latent", "kv_latent", "state_groups", "state_heads"
)  # fmt: skip
"""Axis kinds that can be permuted; `axes.PERMUTABLE`."""

ALIGNABLE = (
    *PERMUTABLE, "rotation", "gains", "scaling", "values", "queries", "copies", "padding", "identity", "all", "auto"
)  # fmt: skip
"""What alignment can undo; `alignment.KINDS` and `alignment.WHOLE`."""

REWRITES = (
    *("rename", "identity", "split", "cancel", "pad", "repeat", "gains", "units", "values", "queries"),
    *("rotate", "means", "permute", "all"),
)
"""Random function-preserving rewrites; the names of `rewrites.DISGUISES`, and all."""

CLAIMS = ("same-as", "finetune-of", "adapter-of", "quantised-of", "pruned-of", "merge-of", "from-scratch")
"""Claims that can be tested; the names of `claims.ASSERTS`."""

MATCH_FORMS = ("forward", "weights")
"""Forms of `match` and `match_all`: activations on a text, or on the shared embeddings without a forward pass."""

MOMENT_SCOPES = ("model", "layer")
"""Kinds of moments of `match_moments`: of the weights of all layers, or of a unit's own layer."""

COMPONENTS = ("vision", "audio", "encoder")
"""Components of multimodal models that can be compared by their weights alone.

A projector cannot: two that connect the same towers resemble each other, even if trained apart."""

DTYPE_NAMES = ("float32", "bfloat16")
"""Types that a forward pass computes in; the names of `experiment.DTYPES`."""

PAIRINGS = ("all", "split", "specified", "tree")
"""Ways to make pairs of a list: every two models; bases x fine-tunes; two lists in step; every two, descent known."""


def download_option() -> Any:
    """Declares the option `download_dir` of a command."""
    return option(None, "A folder to keep downloads in.")


@dataclass(frozen=True)
class Mesh:
    """How devices are arranged."""

    data: int = option(-1, "Devices that blocks of tokens are split over; -1 takes all that are left.", at_least=-1)
    model: int = option(1, "Devices that heads and MLP units are split over; -1 takes all that are left.", at_least=-1)


@dataclass(frozen=True)
class Mode:
    """Loss along the path between the two models: its midpoint, its barrier and the curve."""

    alphas: tuple[float, ...] = option(
        tuple(i / 10 for i in range(11)), "Points of the path; 0, 0.5 and 1 are always added.", at_least=0, at_most=1
    )
    attn: bool = option(False, "Move attention along the path too.")
    emb: bool = option(False, "Move embeddings, head and final norm along the path too.")
    path: str = option(
        "linear",
        "linear: the straight path. bezier: beside it a quadratic Bezier curve whose middle point is trained on other "
        "text so that the loss along it is low (section learned).",
        choices=("linear", "bezier"),
    )
    calibrate: bool = option(
        False,
        "Also the loss at the best temperature of each point, fitted on one half of the text and taken on the other.",
    )
    by_layer: bool = option(False, "Also the barrier of each layer by itself: it alone moves from base to ft.")
    num_perm: int = option(
        0, "Permuted copies among which the midpoint loss is ranked; 0 gives no p-value.", at_least=0
    )


@dataclass(frozen=True)
class Cos:
    """Best-match cosine of the MLP units' gate weights, median per layer, mean over layers; no p-value."""


@dataclass(frozen=True)
class Emb:
    """Best-match cosine of the embedding rows of shared tokens, median; no p-value."""

    max_rows: int = option(16384, "The most embedding rows of base that are compared.", at_least=1)


@dataclass(frozen=True)
class Jsd:
    """Jensen-Shannon divergence of the two models' predictions; no p-value."""


@dataclass(frozen=True)
class Csu:
    """Up-projection rows matched, and the matching compared with the identity; exact."""

    units: int = option(0, "The most units of each of base's layers that are matched to ft's; 0 takes all.", at_least=0)


@dataclass(frozen=True)
class CsuAll:
    """The rows of every matrix matched, each matrix with a p-value of its own; exact for gate, up, down and o."""

    all_pairs: bool = option(False, "Every two matrices of equal shape, not only those of one name and layer.")


@dataclass(frozen=True)
class Csh:
    """Hidden activations on random tokens matched, and the matching compared with the identity; exact."""

    blocks: int = option(20, "Blocks of random tokens, the same for both models.", at_least=1)
    block_size: int = option(512, "Tokens of a block.", at_least=2)
    activation: str = option("hidden", "Activation of an MLP unit that is matched.", choices=("hidden", "up"))


@dataclass(frozen=True)
class Match:
    """Gate and up projection matched apart: do they agree on which unit is which? Disguised or not; calibrated."""

    forms: tuple[str, ...] = option(
        MATCH_FORMS, "Activations on the text (forward), on shared embeddings (weights), or both.", choices=MATCH_FORMS
    )
    max_tokens: int = option(16384, "The most shared tokens whose embeddings the weights form uses.", at_least=1)
    units: int = option(
        0,
        "The most units of each of base's layers that the weights form looks for in ft's; 0 takes all.",
        at_least=0,
    )


@dataclass(frozen=True)
class MatchAll:
    """`match` on every pair of layers: which layer of one model comes from which layer of the other; calibrated."""

    forms: tuple[str, ...] = option(
        MATCH_FORMS, "Activations on the text (forward), on shared embeddings (weights), or both.", choices=MATCH_FORMS
    )
    positions: int = option(2048, "Sampled positions of the text, and shared tokens.", at_least=1)
    units: int = option(1024, "The most units of each of base's layers that are matched to ft's.", at_least=1)
    max_gib: float = option(4.0, "The most memory that the kept activations take, in GiB.", above=0)


@dataclass(frozen=True)
class MatchMlps:
    """`match` and `csu` of every MLP of one model with every MLP of the other, experts too; calibrated, and exact."""

    max_pairs: int = option(
        4096, "The most pairs of MLPs that are compared; of larger mixtures some are drawn.", at_least=1
    )


@dataclass(frozen=True)
class MatchMoments:
    """Gate and up rows matched by how other layers' weights act on them; no text, no embeddings; calibrated."""

    forms: tuple[str, ...] = option(
        MOMENT_SCOPES, "Moments of all layers (model), of a unit's own layer (layer), or both.", choices=MOMENT_SCOPES
    )
    layers: int = option(0, "So many layers are drawn, compared and give moments; 0 takes all.", at_least=0)
    units: int = option(0, "The most units of each of base's layers that are matched to ft's; 0 takes all.", at_least=0)


@dataclass(frozen=True)
class MatchIo:
    """MLP units matched by what they read from shared tokens, and apart by what they write; no text; calibrated."""

    max_tokens: int = option(2048, "The most shared tokens that units are matched by.", at_least=32)
    units: int = option(1024, "The most units of each of base's layers that are matched to ft's.", at_least=1)


@dataclass(frozen=True)
class MatchCrossfit:
    """A rotation learnt from the MLPs of half of the layers; do rows of the other half agree? No text; calibrated."""


@dataclass(frozen=True)
class MatchHeads:
    """Query heads matched by how they attend to shared tokens, and apart by what they write; no text; calibrated."""


@dataclass(frozen=True)
class UnseenTokens:
    """Embedding rows of tokens that no text holds, matched and compared with the identity; exact, for embeddings."""


@dataclass(frozen=True)
class FeaturesInPlace:
    """Features of the residual stream matched by all matrices, and the matching compared with the identity; exact."""


@dataclass(frozen=True)
class CsuProcrustes:
    """`csu` after the residual stream of ft is rotated to base's by the shared tokens' embeddings; exact."""


@dataclass(frozen=True)
class HeadsInPlace:
    """Attention heads matched by descriptors, and the matching compared with the identity; exact."""


@dataclass(frozen=True)
class MatchDistilled:
    """Gated students of any FFNs (no gate, other width, experts) matched as in `match`; slow, not in `all`."""

    tokens: int = option(32768, "The most paired positions of the text to learn from and to compare on.", at_least=32)
    steps: int = option(2000, "Training steps of a student.", at_least=1)
    batch: int = option(512, "Samples of a step.", at_least=1)


@dataclass(frozen=True)
class Screen:
    """A first test of part of the weights: `csu` on sampled units, `match` on three layers; not in `all`."""

    share: float = option(0.1, "The most of the weights that is read.", above=0, at_most=1)


@dataclass(frozen=True)
class L2:
    """Mean distance of the tensors, ranked among permuted copies; exact."""

    num_perm: int = option(99, "Permuted copies; 0 gives the distance without a p-value.", at_least=0)


@dataclass(frozen=True)
class PermModeL2:
    """Midpoint loss and distance, each ranked among the same permuted copies; exact."""

    num_perm: int = option(99, "Permuted copies.", at_least=1)
    attn: bool = option(False, "Move attention along the path too.")
    emb: bool = option(False, "Move embeddings, head and final norm along the path too.")


@dataclass(frozen=True)
class Merge:
    """Shares of base and of further models in the fine-tuned one, with standard errors (`tracing-jax merge`)."""

    parents: tuple[str, ...] = option((), "Further models that may have a part in the fine-tuned model.")
    base: str | None = option(None, "The model that the parents were made from, if it is known; it may be base.")


@dataclass(frozen=True)
class Learned:
    """What is trained on the loss between the models: `align_evidence=learned` (maps) and `mode.path=bezier`."""

    dataset: str | None = option(
        None,
        "The text to learn from, named as dataset is, or demo-training; by default the run's own text, behind what the "
        "statistics read.",
    )
    num_tokens: int = option(524288, "The most tokens to learn from; a part is held out for early stopping.", above=0)
    steps: int = option(600, "Steps of Adam, at most.", at_least=1)
    ends: str = option("ft", "Which models are mapped: ft, or both.", choices=("ft", "both"))


STATISTICS: Mapping[str, type] = {
    "mode": Mode, "cos": Cos, "emb": Emb, "jsd": Jsd, "csu": Csu, "csu_all": CsuAll, "csh": Csh, "match": Match,
    "match_all": MatchAll, "match_mlps": MatchMlps, "match_moments": MatchMoments, "match_io": MatchIo,
    "match_crossfit": MatchCrossfit, "match_heads": MatchHeads, "match_distilled": MatchDistilled, "screen": Screen,
    "unseen_tokens": UnseenTokens, "features_in_place": FeaturesInPlace, "csu_procrustes": CsuProcrustes,
    "heads_in_place": HeadsInPlace, "l2": L2,
    "perm_mode_l2": PermModeL2,
}  # fmt: skip
"""Name of a statistic -> its section."""

_models, _statistics, _text, _rewrites, _computing, _output = (
    functools.partial(option, group=group)
    for group in ("models", "statistics", "text", "disguise and alignment", "computing", "output")
)


@dataclass(frozen=True)
class RunOptions:
    """The options of a run: the general ones, and a section for the mesh, learned alignments and each statistic.

    Example:
      >>> options = tj.RunOptions.from_config({"stat": "csu, match", "match": {"max_tokens": 4096}})
      >>> options.stat, options.match.max_tokens
      (('csu', 'match'), 4096)
    """

    base_model_id: str | None = _models(
        None, "Base model: a folder, a Hub id org/name or org/name@revision, or demo:<member>."
    )
    ft_model_id: str | None = _models(None, "Fine-tuned model: the one that may descend from base; named as base is.")
    ft_model_ids: tuple[str, ...] = _models((), "Several fine-tuned models against one base, in place of ft_model_id.")
    adapter_base: str | None = _models(
        None, "The model that a LoRA adapter in ft's folder belongs to, in place of the one that it names."
    )
    tokenizer_id: str | None = _models(
        None, "A folder or Hub id whose tokenizer is read for models of which none can be read."
    )
    base_layout: str | None = _models(
        None, "A YAML file that says where the parts of base are stored: base is then read by its weights alone."
    )
    ft_layout: str | None = _models(None, "The same for the fine-tuned model.")
    component: str | None = _models(
        None,
        "A component of multimodal models, compared by its weights alone.",
        choices=COMPONENTS,
    )
    control_model_ids: tuple[str, ...] = _models(
        (), "match*: models of base's shape and tokenizer that are known to be independent of both."
    )

    stat: tuple[str, ...] = _statistics(
        ("mode",),
        "Statistics. auto: the tests whose cost is bounded, those of activations where a text is named. all: every one "
        "but match_distilled and screen. merge: of which models the fine-tuned one was merged; alone, with auto.",
        choices=(*STATISTICS, "merge", "auto", "all"),
    )
    level: float = _statistics(
        1e-3,
        "Verdict: related below this level.",
        above=0,
        at_most=0.05,
    )
    verdict: str = _statistics(
        "asked",
        "Tests of the verdict: those among stat (asked), or those of auto as well, beside the pickle (auto).",
        choices=("asked", "auto"),
    )
    claim: str | None = _statistics(
        None, "What is stated of the fine-tuned model, of base: it holds, is contradicted, or cannot be tested.",
        choices=CLAIMS,
    )  # fmt: skip
    eval: bool = _statistics(False, "Perplexity of both models.")

    dataset: str | None = _text(
        "wikitext",
        "wikitext, wikitext2, aya:<language>, m2d2:<field>, dolma:<language>, generated or generated:PATH (files of "
        "generate), random (tokens of both vocabularies), sample (a text of this package, taken where "
        "one is needed and none is named), demo, or a local txt, json, jsonl or parquet file or folder.",
    )
    dataset_id: str | None = _text(None, "The id of a data set on the Hub; takes precedence over dataset.")
    dataset_subset: str | None = _text(None, "Subset of the data set.")
    dataset_split: str | None = _text(None, "Split of the data set.")
    text_column: str | None = _text(None, "The column of the data set that holds the text.")
    data_dir: str | None = _text(None, "A folder with local copies of named data sets, as NAME or NAME/PART.")
    num_tokens: int = _text(65536, "The most tokens of base's tokenizer that are read.", at_least=1)
    block_size: int = _text(512, "Tokens of a block.", at_least=2)

    permute: bool = _rewrites(False, "Permute the fine-tuned model's own weights first.")
    permute_axes: tuple[str, ...] = _rewrites(("embed", "mlp"), "Axes that are permuted.", choices=PERMUTABLE)
    disguise: tuple[str, ...] = _rewrites(
        (), "Before that, rewrites that keep the fine-tuned model's function, applied in order.", choices=REWRITES
    )
    align: bool = _rewrites(
        False, "Align the fine-tuned model to base and compute the statistics again, without p-values."
    )
    align_axes: tuple[str, ...] = _rewrites(
        ("embed", "mlp"),
        "What is undone: permutations of axes, other maps, all, or auto (permutations and padding where they explain "
        "the weights, else all).",
        choices=ALIGNABLE,
    )
    align_evidence: str = _rewrites(
        "weights",
        "What the alignment is found from. activations: order of units, or with rotation the map of the features. "
        "learned: gradient descent on the loss between the models, from an alignment by weights (section learned).",
        choices=("weights", "activations", "learned"),
    )
    save_aligned: str | None = _rewrites(
        None, "A folder to write the aligned model to, as a checkpoint; base, if it is mapped too, to FOLDER-base."
    )

    batch_size: int = _computing(8, "Blocks in flight.", at_least=1)
    memory: str = _computing(
        "auto",
        "resident holds both models whole, stream takes them layer by layer, auto decides by what is free.",
        choices=("auto", "resident", "stream"),
    )
    dtype: str = _computing("float32", "Of hidden states and matmuls; losses are float32 always.", choices=DTYPE_NAMES)
    max_layers: int = _computing(0, "Use only the first layers, to see what a run takes; 0 for all.", at_least=0)
    cache_dir: str | None = _computing(None, "A folder to keep converted weights in, in Orbax format.")
    seed: int = _computing(0, "Every random draw of the run follows from it.", at_least=0, at_most=2**32 - 1)

    save: str | None = _output(
        "runs/{stat}.p",
        "The pickle to write, with json, png, html and a .run folder beside it; {stat} is replaced by the statistics.",
    )

    mesh: Mesh = Mesh()
    learned: Learned = Learned()
    mode: Mode = Mode()
    cos: Cos = Cos()
    emb: Emb = Emb()
    jsd: Jsd = Jsd()
    csu: Csu = Csu()
    csu_all: CsuAll = CsuAll()
    csh: Csh = Csh()
    match: Match = Match()
    match_all: MatchAll = MatchAll()
    match_mlps: MatchMlps = MatchMlps()
    match_moments: MatchMoments = MatchMoments()
    match_io: MatchIo = MatchIo()
    match_crossfit: MatchCrossfit = MatchCrossfit()
    match_heads: MatchHeads = MatchHeads()
    match_distilled: MatchDistilled = MatchDistilled()
    screen: Screen = Screen()
    unseen_tokens: UnseenTokens = UnseenTokens()
    features_in_place: FeaturesInPlace = FeaturesInPlace()
    csu_procrustes: CsuProcrustes = CsuProcrustes()
    heads_in_place: HeadsInPlace = HeadsInPlace()
    l2: L2 = L2()
    perm_mode_l2: PermModeL2 = PermModeL2()
    merge: Merge = Merge()

    @classmethod
    def from_config(cls, config: Any) -> "RunOptions":
        """Returns typed options from a ConfigDict, a nested mapping or options; what it lacks has its default.

        Lists may be given as text with commas.

        Raises:
          ConfigError: unknown names and values of the wrong type, all at once. Ranges are a matter of `problems`.
        """
        return config if isinstance(config, RunOptions) else from_mapping(cls, config, unknown_option)

    def with_save_path(self) -> "RunOptions":
        """Returns the options with the names of the statistics filled in for `{stat}` in `save`."""
        return replace(self, save=self.save and self.save.replace("{stat}", "-".join(self.stat)))

    def as_dict(self) -> dict[str, Any]:
        """Returns the options as nested plain data."""
        return asdict(self)

    def on_demo(self) -> "RunOptions":
        """Returns the options on the demo family: models, text and sizes that a laptop runs in minutes."""
        return replace(
            self,
            base_model_id="demo:base",
            ft_model_id="demo:disguised",
            align=True,
            eval=True,
            align_axes=("embed", "mlp", "kv_heads", "q_group"),
            dataset="demo",
            num_tokens=8192,
            block_size=128,
            batch_size=16,
            save="runs/{stat}-demo.p",
            learned=replace(self.learned, dataset="demo-training"),
            mode=replace(self.mode, attn=True, emb=True),
            perm_mode_l2=replace(self.perm_mode_l2, attn=True, emb=True),
        )


COMPARE = RunOptions(stat=("auto",), dataset=None, save="runs/compare.p")
"""The default verdict: tests that need no text. With a text there are tests of activations too."""

ALIGN = RunOptions(
    stat=("csu", "l2"), l2=L2(num_perm=0), dataset=None, align=True, align_axes=("auto",), save="runs/align.p"
)
"""An alignment, with the distance of the two models before and after it."""

ZOO = RunOptions(stat=("auto", "jsd", "l2"), dataset="sample", num_tokens=8192, l2=L2(num_perm=0), save="runs/zoo.p")
"""All pairs of a list of models: the tests of `compare` for the verdicts, and distances for the tree."""


MOVED = {
    "attn": "mode.attn or perm_mode_l2.attn",
    "emb": "mode.emb or perm_mode_l2.emb",
    "alphas": "mode.alphas",
    "mode_num_perm": "mode.num_perm",
    "num_perm": "l2.num_perm or perm_mode_l2.num_perm",
    "emb_max_rows": "emb.max_rows",
    "csh_blocks": "csh.blocks",
    "csh_block_size": "csh.block_size",
    "csh_activation": "csh.activation",
    "csu_all_pairs": "csu_all.all_pairs",
    "match_forms": "match.forms or match_all.forms",
    "match_all_gib": "match_all.max_gib",
    "screen_share": "screen.share",
} | {f"distil_{name}": f"match_distilled.{name}" for name in ("tokens", "steps", "batch")}
"""Options by the names that they had in 0.1.0 -> the names that they have now."""


@functools.cache
def _names() -> tuple[list[str], list[str]]:
    """Returns the names of all options and of all sections; a zoo checks the options of every pair."""
    return [found.name for found in options_of(RunOptions)], [*sections_of(RunOptions)]


def unknown_option(name: str) -> str | None:
    """Returns why there is no option or section of a dotted name, with the one that may be meant; None if there is.

    A name with `=` behind it is given a value: a section is then an error.
    """
    known, sections = _names()
    is_set, name = name.endswith("="), name.removesuffix("=")
    if name in known or (name in sections and not is_set):
        return None
    if name in MOVED:
        return f"{name}: that option is {MOVED[name]} now"
    if name in sections:
        return f"{name}: it is a section, with options of its own"
    return f"{name}: there is no such option{suggestion(name, [*known, *sections])}"
