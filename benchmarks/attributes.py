"""Every attribute that a family's config declares, changed: it is refused, or our logits change as transformers' do.

    python -m benchmarks.attributes [--families llama,phi3] [--write]

Of each family with a forward pass a tiny random model is made, once for each declared attribute and each other value of
it: numbers are enlarged, switches turned, what is not set is set. What transformers cannot build is left out. `--write`
replaces the section on attributes in docs/families.md.
"""

import argparse
import collections
import dataclasses
import json
import logging
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.families import TABLE, tiny_config
from benchmarks.published_configs import HEADING as NEXT_HEADING
from benchmarks.published_configs import TOLERANCE, difference, expected_logits, tiny_model
from tracing_jax.dataclass_options import comma_list

HEADING = "## Config attributes"

_NOT_CHANGED = frozenset(
    """vocab_size num_hidden_layers n_layer num_layers bos_token_id eos_token_id pad_token_id id2label label2id
    architectures dtype transformers_version problem_type is_encoder_decoder""".split()
)
"""Sizes that every model has, and what says nothing of a model's numbers."""


def other_values(value: Any) -> Iterator[Any]:
    """Yields values that an attribute may have in place of this one."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 2 * value)
    elif isinstance(value, float):
        yield 1.5 * value + 0.1
    elif isinstance(value, str):
        yield "relu"
    elif value is None:
        yield from (True, 3, 0.37)


def changed_configs(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what is changed of a tiny model of a family, and its config."""
    from transformers import CONFIG_MAPPING

    plain = tiny_config(family).to_dict()
    for name in sorted({field.name for field in dataclasses.fields(CONFIG_MAPPING[family])} - _NOT_CHANGED):
        for value in other_values(plain.get(name)):
            yield f"{name} {value}", plain | {name: value}


def outcome(config: Mapping[str, Any], folder: Path) -> str:
    """Returns `refused`, `not built`, `equal`, or `wrong` with the difference."""
    from tracing_jax.arch import UnsupportedModelError, read_arch
    from tracing_jax.checkpoint import CheckpointError, open_checkpoint

    (folder / "config.json").write_text(json.dumps(config))
    try:
        read_arch(folder)
    except UnsupportedModelError:
        return "refused"
    try:
        model = tiny_model(folder, 0)
        expected = expected_logits(model)
        model.save_pretrained(folder / "model")
    except Exception:  # whatever transformers raises where values do not go together
        return "not built"
    (folder / "model" / "config.json").write_text(json.dumps(config))
    try:
        found = open_checkpoint(str(folder / "model"))
    except CheckpointError:  # shapes that the sizes in the config do not give
        return "refused"
    error = difference(found, expected)
    return "equal" if error <= TOLERANCE else f"wrong: {error:.2g}"


_SECTION = """Each attribute that the config class of a family with a forward pass declares was changed in a tiny
model, alone: {total} changes of {families} families, without those that transformers cannot build. {refused} were
refused, with {equal} the logits were those of transformers to within 2e-4 of the largest, and with {wrong} they were
not: `python -m benchmarks.attributes --write`. Attributes that a class does not declare are tried by
`tests/test_undeclared.py`."""


def main() -> None:
    """Prints the counts of each family, and what is wrong."""
    from tracing_jax.arch import SUPPORTED_FAMILIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", help="names with commas; all with a forward pass by default")
    parser.add_argument("--write", action="store_true", help=f"write the counts into {TABLE.name}")
    options = parser.parse_args()
    if options.families and options.write:
        parser.error("--write with --families: the page holds the counts of all families; leave one of them out")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    families = comma_list(options.families) if options.families else SUPPORTED_FAMILIES
    total = collections.Counter[str]()
    for family in families:
        counts = collections.Counter[str]()
        for change, config in changed_configs(family):
            with tempfile.TemporaryDirectory() as folder:
                found = outcome(config, Path(folder))
            counts[found.partition(":")[0]] += 1
            if found.startswith("wrong"):
                print(f"{family}: {change}: {found}", flush=True)
        print(family, dict(counts), flush=True)
        total += counts
    total["total"] = total["refused"] + total["equal"] + total["wrong"]
    shown = {name: f"{total[name]:,}" if total[name] else "none" for name in ("total", "refused", "equal", "wrong")}
    text = _SECTION.format(families=len(families), **shown)
    section = (
        f"{HEADING}\n\n{textwrap.fill(' '.join(text.split()), 120, break_long_words=False, break_on_hyphens=False)}\n"
    )
    print("\n" + section)
    if options.write:
        page, _, rest = TABLE.read_text(encoding="utf-8").partition(NEXT_HEADING)
        before = page.partition(HEADING)[0].rstrip()
        TABLE.write_text(f"{before}\n\n{section}\n{NEXT_HEADING}{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
