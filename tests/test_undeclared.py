"""What a config class does not declare changes no logit of its model, whatever it is called and set to."""

import copy
import dataclasses
from typing import Any

import pytest
from parity_cases import CASES, Case

from tracing_jax.arch import SUPPORTED_FAMILIES

_CASE_OF = {case.config["model_type"]: case for case in reversed(CASES.values())}
_EXCEPTIONS = {"is_causal", "text_config", "decoder", "generator"}
# transformers checks or reads these by name when it makes a config: a wrong value is an error there, no other number.
_CHECKED = {"vision_feature_select_strategy", "layer_types", "mlp_layer_types", "embed_dim"}
# Parts and older names of one; the last is read by all ropes that have a length of their own (tests/test_arch.py).
_ROPE = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
# Older names of what Nemotron-H declares, which its class reads and does not keep.
_OLDER_NAMES = {
    "mamba_n_groups", "mamba_d_conv", "mamba_expand", "mamba_dt_min", "mamba_dt_max", "mamba_dt_limit",
    "mamba_dt_init_floor", "mamba_conv_bias", "mamba_chunk_size",
}  # fmt: skip
_OWN_MASK = {"gpt_neo", "mpt"}  # is causal whatever the config says; builds no other mask


def _config(case: Case, **undeclared: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**copy.deepcopy(case.config), **undeclared)  # which writes into dicts of it


def _logits(case: Case, **undeclared: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_config(case, **undeclared), attn_implementation="eager").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        return model(torch.tensor(case.tokens())).logits


def _declared_anywhere() -> dict[str, str]:
    """Returns every attribute that any config class declares, with its type as text."""
    from transformers import CONFIG_MAPPING

    return {
        field.name: str(field.type)
        for model_type in CONFIG_MAPPING
        for field in dataclasses.fields(CONFIG_MAPPING[model_type])
    }


def _odd(kind: str) -> Any:
    return next((value for name, value in (("bool", True), ("float", 0.37), ("int", 3)) if name in kind), "gelu")


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_undeclared_attributes_change_no_logit(family):
    import torch
    from transformers import CONFIG_MAPPING

    case, config_class = _CASE_OF[family], CONFIG_MAPPING[family]
    properties = {name for name, value in vars(config_class).items() if isinstance(value, property)}
    # What the class makes of its fields, such as the head dim of a rope, is none that it does not know.
    own = properties | set(vars(_config(case)))  # transformers refuses a file that sets a property
    own |= {field.name for field in dataclasses.fields(config_class)} | set(case.config)
    own |= {*config_class.attribute_map, *config_class.attribute_map.values()}
    own |= _OLDER_NAMES if family == "nemotron_h" else set()
    # Where layers have sizes of their own, transformers refuses a window beside chunks.
    own |= {"attention_chunk_size"} if family.startswith("gemma4") else set()
    names = {
        name: kind for name, kind in _declared_anywhere().items() if name not in own | _EXCEPTIONS | _CHECKED | _ROPE
    }
    assert len(names) > 1000
    expected = _logits(case)
    odd = {name: _odd(kind) for name, kind in names.items()}
    for values in (odd, {name: False for name, value in odd.items() if value is True}):
        assert torch.equal(_logits(case, **values), expected)
    if "is_causal" not in own and family not in _OWN_MASK:
        assert not torch.equal(_logits(case, is_causal=False), expected)  # the exception, which is refused
