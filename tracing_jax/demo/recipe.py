"""The recipe of a demo family, and the config and tokenizer that make its params a Hugging Face checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers
    import transformers


@dataclass(frozen=True)
class DemoSizes:
    """The sizes of the models of a family, of their texts (in pieces), and of their training.

    The defaults give models of 600,000 parameters that train in about two minutes on two cores.
    """

    vocab_size: int = 1024
    embed_dim: int = 96
    num_layers: int = 4
    mlp_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    block_size: int = 128
    batch_size: int = 4
    base_steps: int = 960
    finetune_steps: int = 240
    base_learning_rate: float = 6e-3
    finetune_learning_rate: float = 2e-3
    weight_decay: float = 0.1
    base_pieces: int = 600
    finetune_pieces: int = 300
    seed: int = 0


DEFAULT = DemoSizes()


def train_tokenizer(recipe: DemoSizes, texts: Iterable[str]) -> "tokenizers.Tokenizer":
    """Returns a byte-level BPE tokenizer of the texts: encoding any string and decoding it gives it back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=recipe.vocab_size, initial_alphabet=bytes_, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_config_and_tokenizer(folder: Path, recipe: DemoSizes, tokenizer: "tokenizers.Tokenizer") -> None:
    """Writes the config and the tokenizer of a recipe's models as transformers does."""
    from transformers import PreTrainedTokenizerFast

    config(recipe).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False).save_pretrained(folder)


def config(recipe: DemoSizes) -> "transformers.LlamaConfig":
    """Returns the transformers config of the recipe's models."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.embed_dim,
        intermediate_size=recipe.mlp_dim,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=recipe.block_size,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
