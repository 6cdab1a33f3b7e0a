"""The norms around an MLP, by their names: gains are evidence of nothing, but rewrites move them into matrices."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from tracing_jax.checkpoint.weights_only.mlps import ATTENTION
from tracing_jax.checkpoint.weights_only.names import module_of

Norm = Literal["rms", "rms_unit_offset", "layer_norm"]

_PRE = re.compile(
    r"pre_?(feed_?forward|mlp|ffn?|moe)|^(ffn|mlp|ff|feed_?forward)_?(layer_?)?(norm|ln)|^(norm|ln)_?(ffn|mlp|ff|2)$"
    r"|^ln_?2$|^norm_?2$|^layer_?norm_?2$|^channel_pre_norm$"
    r"|^final_layer_norm$"  # fairseq's name for it in every layer
)
_POST = re.compile(r"post_?(feed_?forward|mlp|ffw|ffn?|moe)")
_NORM = re.compile(r"norm|(^|_)ln(_|$|\d)")
_MLP_WORD = re.compile(r"feed_?forward|mlp|ffw|ffn?|moe")

NORM_OF_TYPE: Mapping[str, Norm] = {
    **dict.fromkeys(("cohere2_moe", "cohere_compass_text", "modernbert-decoder"), "layer_norm"),
    **dict.fromkeys(("cpmant", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "xlstm"), "rms"),
}  # fmt: skip
"""Model type -> what its norms compute in transformers, where neither a bias nor the config says it."""


class MlpNorms(NamedTuple):
    """The norms before and after the MLP of every layer.

    Attributes:
      before, after: what follows the number of the layer in the names of their gains; None if there is none.
      problem: why the one before it is not known; None if it is.
    """

    before: str | None
    after: str | None
    problem: str | None = None


def norms_of_layer(shapes: dict[str, tuple[int, ...]], width: int) -> list[str]:
    """Returns the gains of the norms over the features in a layer, by their names after its number."""
    found = []
    for rest, shape in shapes.items():
        *parents, own = module_of(rest).split(".")
        is_gain = shape == (width,) and _NORM.search(own.lower()) and not rest.endswith("bias")
        if is_gain and not any(ATTENTION.search(parent.lower()) for parent in parents):
            found.append(rest)
    return found


def without_gains(shapes: Iterable[str]) -> bool:
    """Returns whether no tensor of a layer is a gain by its name, besides those inside of attention.

    Args:
      shapes: the names of the tensors after the number of the layer.
    """
    modules = [module_of(rest).lower() for rest in shapes]
    return not any(_NORM.search(module) for module in modules if not ATTENTION.search(module))


def mlp_norms(norms: Iterable[str], has_final_norm: bool) -> MlpNorms:
    """Returns which of the norms of a layer come before and after its MLP.

    Args:
      norms: their names after the number of the layer.
      has_final_norm: whether there is a norm after the last layer; without one, norms may come after each part.
    """
    own = {rest: module_of(rest).rpartition(".")[2].lower() for rest in norms}
    pre = [rest for rest, name in own.items() if _PRE.search(name) and not name.startswith("post")]
    post = [rest for rest, name in own.items() if _POST.search(name)]
    attention = [rest for rest, name in own.items() if re.match(r"post_?(self_)?att(entio)?n", name)]
    first = [rest for rest, name in own.items() if re.search(r"input|pre_?att|^att(entio)?n_norm|ln_?1|norm_?1", name)]
    after = post[0] if len(post) == 1 else None
    if not own:
        return MlpNorms(None, None, "no norms were found in the layers")
    if len(attention) == 2 and after:  # of Llama's name, and its namesake after attention, as `after` is after the MLP
        namesakes = [_MLP_WORD.sub(word, own[after]) for word in ("attn", "attention")]
        attention = [rest for rest in attention if own[rest] not in namesakes]
    if not has_final_norm:
        return MlpNorms(
            None, None, "there is no norm after the last layer, so that those of a layer may follow its parts"
        )
    if len(pre) == 1:
        return MlpNorms(pre[0], after)
    if not pre and len(attention) == 1 and first:
        return MlpNorms(attention[0], after)
    plain = [rest for rest in attention if "self" not in own[rest]]
    if not pre and len(plain) == 1 and first:
        return MlpNorms(plain[0], after)
    if not pre and post and attention and not first:
        return MlpNorms(None, after)
    if len(own) == 1 and not post and not attention:
        return MlpNorms(next(iter(own)), None)
    return MlpNorms(None, None, f"which norm comes before the MLP is not clear among {', '.join(own.values())}")
