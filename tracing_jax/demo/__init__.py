"""The demo's models: small ones trained here, in minutes, on text that every Python installation contains.

`base` is trained on the language reference (`pydoc_data.topics`) and the docstrings of the standard library. `finetune`
is base fine-tuned on numpy's docstrings. `disguised` is the fine-tune with all its units permuted, written as a
checkpoint. `independent` starts from another seed and is trained on base's text in base's order. All four are Hugging
Face folders, opened like any other checkpoint; so are the twelve of the zoo (`zoo_models.py`).

    base = open_checkpoint(str(family().member("base")))
    pruned = open_checkpoint(str(member("ash-pruned@7")))  # of the zoo with seed 7
"""

from pathlib import Path

from tracing_jax.demo.members import MEMBERS, DemoModels, family, held_out_text, training_text
from tracing_jax.demo.recipe import DemoSizes, config, train_tokenizer
from tracing_jax.demo.texts import base_text, finetune_text, split
from tracing_jax.demo.training import init, learning_rates, optimizer, train_step, unigram_entropy
from tracing_jax.demo.zoo_models import ROOTS, TREE, tree_member
from tracing_jax.forward import mean_loss

__all__ = [
    "MEMBERS", "ROOTS", "TREE", "DemoModels", "DemoSizes", "base_text", "config", "family", "finetune_text",
    "held_out_text", "init", "is_member", "learning_rates", "mean_loss", "member", "optimizer", "split", "train_step",
    "train_tokenizer", "training_text", "tree_member", "unigram_entropy",
]  # fmt: skip


def member(name: str) -> Path:
    """Returns the checkpoint folder of a member of the family or of the zoo, `ash-tuned` or `ash-tuned@<seed>`.

    Raises:
      ValueError: there is no such member.
    """
    if name in MEMBERS:
        return family().member(name)
    if not is_member(name):
        raise ValueError(
            f"the demo has no {name!r}, it has {', '.join((*MEMBERS, *TREE))}, the latter also as NAME@SEED"
        )
    tree_name, _, seed = name.partition("@")
    return tree_member(tree_name, int(seed or 0))


def is_member(name: str) -> bool:
    """Returns whether the demo has a model of this name."""
    tree_name, at, seed = name.partition("@")
    return name in MEMBERS or (tree_name in TREE and (not at or (seed.isdigit() and len(seed) < 9)))
