"""A mixture of experts: MLPs among which a router chooses for every token.

Letters: B batch, T position, D embed, E experts, F mlp (units of one expert), k experts per token.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tracing_jax.arch import Arch
from tracing_jax.models.layers import ACTIVATIONS, KERNEL_INIT, Kernel, einsum


class Stack(nn.Module):
    """The kernels of all experts, stacked."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", KERNEL_INIT, self.shape)


class ExpertMlp(nn.Module):
    """The sum of the k chosen experts' gated MLPs, weighted by the router.

    Every expert computes every token, one expert at a time, and those not chosen count nothing: the numbers are exact,
    only one expert's activations `[B T F]` live at a time, and the cost is E / k times that of computing the chosen
    experts alone (4 times for 8 experts, 2 per token).

    Source: Jiang et al. 2024, Mixtral of Experts (arXiv 2401.04088), section 2.1.
    """

    arch: Arch

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        a = self.arch
        assert a.num_experts is not None
        D, E, F = a.embed_dim, a.num_experts, a.mlp_dim
        shares = self._shares(Kernel((D, E), "btd,de->bte", name="router")(x))
        gates, ups = (Stack((E, D, F), name=name)() for name in ("gate_proj", "up_proj"))
        downs = Stack((E, F, D), name="down_proj")()
        tapped = self.is_mutable_collection("taps")

        def add_expert(
            total: jax.Array, expert: tuple[jax.Array, ...]
        ) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
            share, *kernels = expert
            gate_kernel, up_kernel, down_kernel = (kernel.astype(x.dtype) for kernel in kernels)
            gate, up = einsum("btd,df->btf", x, gate_kernel), einsum("btd,df->btf", x, up_kernel)
            units = ACTIVATIONS[a.activation](gate) * up
            y = einsum("btf,fd->btd", units, down_kernel).astype(jnp.float32)
            return total + share[..., None] * y, (gate, up, units) if tapped else None

        nothing = jnp.zeros(x.shape, jnp.float32)
        total, found = jax.lax.scan(add_expert, nothing, (jnp.moveaxis(shares, -1, 0), gates, ups, downs))
        for tap, activations in zip(("gate", "up", "units"), found or ()):
            self.sow("taps", tap, jnp.moveaxis(activations, 0, 2))  # [E B T F] -> [B T E F]
        return total.astype(x.dtype)

    def _shares(self, scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Returns every expert's share in a token: softmax over the k experts of greatest score, 0 for the others."""
        assert self.arch.experts_per_token is not None
        greatest, chosen = jax.lax.top_k(scores.astype(jnp.float32), self.arch.experts_per_token)
        shares = jax.nn.softmax(greatest, axis=-1)
        return (jax.nn.one_hot(chosen, scores.shape[-1]) * shares[..., None]).sum(-2)
