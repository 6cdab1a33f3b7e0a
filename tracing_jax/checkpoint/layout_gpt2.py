"""GPT-2's tensor names: linear weights are `[in, out]` there, and queries, keys and values lie in one tensor."""

from collections.abc import Iterator, Mapping

from tracing_jax.arch import Arch
from tracing_jax.checkpoint.tensor_layout import Entry, Piece


def gpt2_layouts(arch: Arch) -> Iterator[Mapping[str, Entry]]:
    """Yields the layouts in which files are found: as transformers writes them, and as a bare backbone."""
    for prefix in ("transformer.", ""):
        yield _layout(arch, prefix)


def _layout(arch: Arch, prefix: str) -> Mapping[str, Entry]:
    D, V = arch.embed_dim, arch.vocab_size
    assert arch.num_positions is not None
    entries = {
        "embed/embedding": _whole(f"{prefix}wte.weight", V, D),
        "embed/positions": _whole(f"{prefix}wpe.weight", arch.num_positions, D),
    }
    for i in range(arch.num_layers):
        block = _attention(arch, f"{prefix}h.{i}.") | _mlp(arch, f"{prefix}h.{i}.")
        entries |= {f"layers/{i}/{name}": entry for name, entry in block.items()}
    entries |= _norm("head/norm", f"{prefix}ln_f", D)
    if not arch.tied:
        entries["head/lm_head/kernel"] = Entry((Piece("lm_head.weight", (V, D)),), (V, D), (1, 0))
    return entries


def _attention(arch: Arch, at: str) -> dict[str, Entry]:
    D, K, G, H = arch.embed_dim, arch.num_kv_heads, arch.q_group, arch.head_dim
    entries = {}
    for i, (name, heads) in enumerate({"q_proj": (K, G, H), "k_proj": (K, H), "v_proj": (K, H)}.items()):
        weight = Piece(f"{at}attn.c_attn.weight", (D, 3 * D), axis=1, start=i * D, stop=(i + 1) * D)
        bias = Piece(f"{at}attn.c_attn.bias", (3 * D,), start=i * D, stop=(i + 1) * D)
        entries[f"attn/{name}/kernel"] = _as_it_is(weight, D, *heads)
        entries[f"attn/{name}/bias"] = _as_it_is(bias, *heads)
    entries["attn/o_proj/kernel"] = _as_it_is(Piece(f"{at}attn.c_proj.weight", (D, D)), K, G, H, D)
    entries["attn/o_proj/bias"] = _whole(f"{at}attn.c_proj.bias", D)
    return entries | _norm("attn_norm", f"{at}ln_1", D)


def _mlp(arch: Arch, at: str) -> dict[str, Entry]:
    D, F = arch.embed_dim, arch.mlp_dim
    return {
        "mlp/up_proj/kernel": _whole(f"{at}mlp.c_fc.weight", D, F),
        "mlp/up_proj/bias": _whole(f"{at}mlp.c_fc.bias", F),
        "mlp/down_proj/kernel": _whole(f"{at}mlp.c_proj.weight", F, D),
        "mlp/down_proj/bias": _whole(f"{at}mlp.c_proj.bias", D),
    } | _norm("mlp_norm", f"{at}ln_2", D)


def _norm(ours: str, theirs: str, size: int) -> dict[str, Entry]:
    return {f"{ours}/scale": _whole(f"{theirs}.weight", size), f"{ours}/bias": _whole(f"{theirs}.bias", size)}


def _whole(tensor: str, *shape: int) -> Entry:
    return _as_it_is(Piece(tensor, shape), *shape)


def _as_it_is(piece: Piece, *unfolded: int) -> Entry:
    return Entry((piece,), unfolded, tuple(range(len(unfolded))))
