"""The fields that every run has, with their defaults. A config file of this folder is an experiment made from these."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(stat: str, arg: str = "") -> ConfigDict:
    """Returns the common config of a run of `stat`; `demo` as the argument runs it on the demo family.

    Raises:
      ValueError: any other argument.
    """
    if arg not in ("", "demo"):
        raise ValueError(f"a config takes the argument demo or none, found {arg!r}")
    config = ConfigDict()

    # The pair: local folders, Hub ids `org/name` or `org/name@revision`, or demo:<member>.
    config.base_model_id = placeholder(str)
    config.ft_model_id = placeholder(str)

    # The statistics: a name, several with commas between, or all.
    config.stat = stat
    config.attn = False  # mode: move attention along the path too
    config.emb = False  # mode: move embeddings, head and final norm too
    config.alphas = tuple(i / 10 for i in range(11))  # mode: 0, 0.5 and 1 are always added
    config.mode_num_perm = 0  # mode: rank the midpoint loss among so many permuted copies; 0 gives no p-value
    config.num_perm = 99  # l2, perm_mode_l2: permuted copies; 0 gives l2 no p-value
    config.emb_max_rows = 16384  # emb: compare at most so many embedding rows of base
    config.csh_blocks, config.csh_block_size = 20, 512  # csh: random tokens, the same for both models
    config.csh_activation = "hidden"  # or up
    config.csu_all_pairs = False  # csu_all: every two matrices of equal shape, not only those of one name and layer
    config.match_forms = "forward,weights"  # match: activations on text, weights on shared embeddings, or both
    config.match_all_gib = 4.0  # match_all: what the kept activations may take
    config.distil_tokens = 32768  # match_distilled: at most so many positions to learn from
    config.distil_steps, config.distil_batch = 2000, 512  # of a student's training
    config.distil_rate, config.distil_decay = 0.3, 0.03  # both fall to zero along a cosine; see docs/distilled.md
    config.distil_units = 0  # width of the students; 0 takes the narrower model's
    config.screen_share = 0.1  # screen: of the weights, the most that it looks at
    config.control_model_ids = ()  # match*: models of base's shape and tokenizer, known to be independent of both

    # The verdict: related below this level, undecided from there to 0.05, else independent.
    config.level = 1e-3

    # Step 2, permute the fine-tuned model's own weights, and step 4, align it to base.
    config.permute = False
    config.permute_axes = "embed,mlp"  # of embed, mlp, kv_heads, q_group, expert
    config.disguise = ""  # before that: of identity, pad, gains, units, values, queries, rotate, permute; or all
    config.align = False
    # Of embed, mlp, kv_heads, q_group, expert (permutations), rotation, gains, scaling, values, queries, padding,
    # identity; or all; or auto: permutations and padding where they explain the weights, else all.
    config.align_axes = "embed,mlp"
    config.align_evidence = "weights"  # or activations
    config.save_aligned = placeholder(str)  # a folder to write the aligned model to, as a checkpoint

    # Step 6, perplexity of both models.
    config.eval = False

    # The text: wikitext, wikitext2, aya:<language>, m2d2:<field>, dolma:<language>, generated or generated:PATH (files
    # of generate.py), random (tokens of both vocabularies), a local file or folder. dataset_id, a Hub id, goes first.
    config.dataset = "wikitext"
    config.data_dir = placeholder(str)  # local copies of named data sets, as NAME or NAME/PART
    config.dataset_id = placeholder(str)
    config.dataset_subset = placeholder(str)
    config.dataset_split = placeholder(str)
    config.text_column = placeholder(str)
    config.num_tokens = 65536  # at most so many tokens of base's tokenizer
    config.block_size = 512

    # Where and how to compute. -1 takes all devices that are left.
    config.mesh = ConfigDict({"data": -1, "model": 1})
    config.batch_size = 8  # blocks in flight
    config.memory = "auto"  # or resident: both models whole; stream: layer by layer. Auto: by size and what is free
    config.max_layers = 0  # look at the first layers alone, to see what a run takes; 0 for all
    config.dtype = "float32"  # or bfloat16, for hidden states and matmuls; losses are float32 in both
    config.cache_dir = placeholder(str)  # keep converted weights here, in Orbax format

    config.save = f"runs/{stat}.p"
    config.seed = 0
    if arg == "demo":
        _use_demo_family(config)
    return config


def _use_demo_family(config: ConfigDict) -> None:
    config.base_model_id, config.ft_model_id = "demo:base", "demo:disguised"
    config.align = config.eval = config.attn = config.emb = True
    config.align_axes = "embed,mlp,kv_heads,q_group"
    config.dataset = "demo"
    config.num_tokens, config.block_size, config.batch_size = 8192, 128, 16
    config.save = f"runs/{config.stat}-demo.p"
