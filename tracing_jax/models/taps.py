"""Taps: the inner activations of a block that can be asked for, and the axes of their units."""

from collections.abc import Iterable, Mapping

from tracing_jax.arch import Arch, is_attention


def tap_axes(arch: Arch, layer: int = 0) -> Mapping[str, tuple[str, ...]]:
    """Returns tap name -> the kinds of the axes of its units in a layer, which follow B and T.

    * `residual`: the hidden state that a block receives.
    * `heads`: the outputs of the heads of the last that mixes tokens, before its output projection. Of attention that
      reads the keys of an earlier layer they are those of that layer's kv heads.
    * `mlp_input`: what the MLP reads, which is the hidden state, normalised where blocks have pre-norms.
    * `gate`, `up`: the pre-activations of the MLP, of every expert for every token.
    * `units`: its hidden units, likewise. An MLP beside the experts has no tap.
    * `mlp_output`: what it returns, before a post norm.
    """
    units = ("expert", "mlp") if arch.has_experts(layer) else ("mlp",)
    axes: dict[str, tuple[str, ...]] = {
        "residual": ("embed",),
        "heads": _head_axes(arch, layer),
        "mlp_input": ("embed",),
        "gate": units,
        "up": units,
        "units": units,
        "mlp_output": ("embed",),
    }
    return {tap: kinds for tap, kinds in axes.items() if arch.gated or tap != "gate"}


def _head_axes(arch: Arch, layer: int) -> tuple[str, ...]:
    last = next(iter(arch.mixers_of(layer)[-1:]), "")
    if not is_attention(last):
        return ("state_groups", "state_heads", "state_values")
    return ("kv_heads", "q_group", "qk_dim" if arch.heads_of(last).values_are_keys else "v_dim")


def taps_of(arch: Arch) -> tuple[str, ...]:
    """Returns the names of the taps of a model; without a gate there is no tap `gate`."""
    return tuple(tap_axes(arch))


def taps_problem(arch: Arch, taps: Iterable[str]) -> str | None:
    """Returns which of these taps a model lacks and which it has; None if it has them all."""
    unknown = sorted(set(taps) - set(taps_of(arch)))
    return f"unknown taps {', '.join(unknown)}; there are {', '.join(taps_of(arch))}" if unknown else None


_MLP_LEAVES = {"gate": ("mlp/gate_proj",), "up": ("mlp/up_proj",), "units": ("mlp/gate_proj", "mlp/up_proj")}


def mlp_leaves(arch: Arch, taps: Iterable[str]) -> tuple[str, ...]:
    """Returns the names in a layer of the subtrees that `gate`, `up` or `units` are computed from."""
    needed = {leaf for tap in taps for leaf in _MLP_LEAVES[tap]}
    return (arch.mlp_norm, *sorted(needed), *(() if arch.expert_latent_dim is None else ("mlp/latent_in",)))
