"""Floating-point operations of each step, from the shapes: two for each weight that a token meets.

Norms, rotations, softmax and the interpolation itself are left out, as is usual; of a mixture of experts only the
experts that serve a token count. Letters: T positions per block.
"""

from tracing_jax.arch import Arch


def block_flops_per_token(arch: Arch, block_size: int) -> float:
    """Returns the operations of one layer for one token in a block of this length, attention to all T positions."""
    heads = arch.num_kv_heads * arch.q_group
    projections = 2 * arch.embed_dim * arch.head_dim * (heads + arch.num_kv_heads)
    matrices = 3 if arch.gated else 2
    mlp = matrices * arch.embed_dim * arch.mlp_dim * (arch.experts_per_token or 1)
    scores = 2 * block_size * heads * arch.head_dim
    return 2.0 * (projections + mlp + scores)


def head_flops_per_token(arch: Arch) -> float:
    """Returns the operations of the logits of one token."""
    return 2.0 * arch.embed_dim * arch.vocab_size


def gram_flops_per_token(arch: Arch, taps: int) -> float:
    """Returns what one token adds to the cross-Grams of the MLP units of one layer, for so many taps."""
    return 2.0 * taps * arch.mlp_dim**2


def row_gram_flops(arch: Arch) -> float:
    """Returns the operations of all inner products between the rows of an MLP matrix of base and of ft."""
    return 2.0 * arch.embed_dim * arch.mlp_dim**2
