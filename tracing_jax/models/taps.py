"""The taps of a model: which of its inner activations can be asked for, and which axes their units have."""

from collections.abc import Iterable, Mapping

from tracing_jax.arch import Arch


def tap_axes(arch: Arch) -> Mapping[str, tuple[str, ...]]:
    """Returns tap name -> the kinds of the axes of its units, which follow B and T.

    `residual` is the hidden state that a block receives; `heads` the mixed values of its heads before the output
    projection; `mlp_input` what the MLP reads, which is the hidden state, normed where blocks have pre-norms; `gate`
    and `up` its pre-activations and `units` its hidden units, of every expert for every token; `mlp_output` what it
    returns, before a post norm.
    """
    units = ("mlp",) if arch.num_experts is None else ("expert", "mlp")
    axes = {
        "residual": ("embed",),
        "heads": ("kv_heads", "q_group", "v_dim"),
        "mlp_input": ("embed",),
        "gate": units,
        "up": units,
        "units": units,
        "mlp_output": ("embed",),
    }
    return {tap: kinds for tap, kinds in axes.items() if arch.gated or tap != "gate"}


def taps_of(arch: Arch) -> tuple[str, ...]:
    """Returns the names of the taps that a model has; one whose MLP has no gate has no `gate`."""
    return tuple(tap_axes(arch))


def taps_problem(arch: Arch, taps: Iterable[str]) -> str | None:
    """Returns which of the taps a model does not have, and which it has; None if it has them all."""
    unknown = sorted(set(taps) - set(taps_of(arch)))
    return f"unknown taps {', '.join(unknown)}; there are {', '.join(taps_of(arch))}" if unknown else None


_MLP_LEAVES = {"gate": ("mlp/gate_proj",), "up": ("mlp/up_proj",), "units": ("mlp/gate_proj", "mlp/up_proj")}


def mlp_leaves(taps: Iterable[str]) -> tuple[str, ...]:
    """Returns the names in a layer under which the leaves lie that these taps of its MLP are computed from."""
    needed = {leaf for tap in taps for leaf in _MLP_LEAVES.get(tap, ("mlp",))}
    return ("mlp_norm", *sorted(needed))
