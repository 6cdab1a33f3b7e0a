"""Computes the golden files of test_parity.py with transformers: `python tests/make_golden.py [NAME]` (needs torch).

Run it again only when cases change. If a new transformers version changes the numbers, find out why first: the live
test says so without touching these files.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from parity_cases import GOLDEN, Case

FOLDER = Path(__file__).parent / "golden"


def hf_model(case: Case) -> Any:
    """Returns transformers' model with the case's weights, in float32 with plain attention."""
    import torch
    from transformers import AutoModelForCausalLM

    # With plain attention, transformers 5.24 adds the slopes of Falcon's ALiBi twice, with its default once.
    how = {"attn_implementation": "sdpa" if case.config.get("alibi") else "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_config(case.hf_config(), **how).eval()
    own = {name: torch.from_numpy(case.weight(name, shape)) for name, shape in tensor_shapes(model).items()}
    if set(own) <= set(model.state_dict()):
        missing, unexpected = model.load_state_dict(own, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"{case.name}: missing {missing}, unexpected {unexpected}")
        return model
    # A model that holds its weights otherwise than checkpoints do, such as a mixture of experts, converts them itself.
    how |= {"config": case.hf_config(), "state_dict": own, "output_loading_info": True}
    model, info = type(model).from_pretrained(None, **how)
    if problems := {kind: names for kind, names in info.items() if names}:
        raise ValueError(f"{case.name}: {problems}")
    return model.eval()


def tensor_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor that a checkpoint of this model holds."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    if model.config.tie_word_embeddings:
        del tensors[next(name for name in tensors if name in ("lm_head.weight", "embed_out.weight"))]
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def hf_outputs(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns transformers' logits [B T V] and losses [B T-1] in nats."""
    import torch

    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return logits.numpy(), losses.numpy()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or GOLDEN:
        write(FOLDER / f"{name}.npz", GOLDEN[name])


def write(file: Path, cases: Sequence[Case]) -> None:
    """Writes what transformers computes for these cases."""
    logits, losses, tensors = [], [], []
    for case in cases:
        model = hf_model(case)
        case_logits, case_losses = hf_outputs(model, case.tokens())
        logits.append(case_logits[0])  # the second block is held by its losses
        losses.append(case_losses)
        tensors.append(json.dumps(tensor_shapes(model)))
    np.savez_compressed(
        file,
        names=np.array([case.name for case in cases]),
        logits=np.stack(logits),
        losses=np.stack(losses),
        tensors=np.array(tensors),
    )


if __name__ == "__main__":
    main()
