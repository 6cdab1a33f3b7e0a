"""`tracing-jax scan`: whose child is this model? Its relatives in a library of signatures."""

import argparse
import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.compare import LAYOUT, MODEL
from tracing_jax.cli.errors import configure_logging, exit_on_usage_error, exit_on_user_error
from tracing_jax.cli.startup import keep_compiled_programs
from tracing_jax.dataclass_options import REQUIRED, from_values, option
from tracing_jax.options import RunOptions, download_option

if TYPE_CHECKING:
    from tracing_jax.library import Candidate, Scan, Suspect

USAGE = "SUSPECT --library LIBRARY"

_NOT_TESTED = "embeddings"
"""The part of a model of which signatures hold nothing by itself."""


@dataclass(frozen=True)
class ScanOptions:
    """What is scanned for, and how it is shown."""

    library: str = option(REQUIRED, "A folder of signatures, or org/name[@revision] of a data set on the Hub.")
    level: float = option(RunOptions.level, "Related below this level, after Holm.", above=0, at_most=0.05)
    shown: int = option(10, "Candidates that are printed.", at_least=1)
    json: bool = option(False, "Print everything as JSON.")
    screen: bool = option(
        False,
        "Read only the layers that signatures sample, of a model on the Hub by ranges of bytes; what is not found is "
        "then undecided.",
    )
    layout: str | None = option(None, LAYOUT)
    download_dir: str | None = download_option()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("suspect", metavar="SUSPECT", help=f"model: {MODEL}")
    add_options(parser, ScanOptions)


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    configure_logging()
    with exit_on_usage_error():
        options = from_values(ScanOptions, given(parsed, ScanOptions))
    with exit_on_user_error():
        keep_compiled_programs()
        from tracing_jax.experiment.models import open_model
        from tracing_jax.experiment.signing import digest_of, suspect_of
        from tracing_jax.library import library_folder, read_library, scan

        signatures = read_library(library_folder(options.library, options.download_dir))
        model = open_model(parsed.suspect, options.download_dir, layout=options.layout, in_ranges=options.screen)
        suspect = suspect_of(model, signatures.values(), screen=options.screen)
        whole = None if options.screen else functools.partial(digest_of, model)  # a screen has a part of the files
        found = scan(suspect, signatures, options.level, whole)
        if options.json:
            about = {"suspect": parsed.suspect, "library": options.library, "level": options.level}
            print(json.dumps(about | as_dict(found, suspect), indent=1))
            return
        print("\n".join(_lines(found, suspect, options.shown)))


def as_dict(found: "Scan", suspect: "Suspect") -> dict[str, Any]:
    """Returns a scan as plain data."""
    return {
        "sentence": found.sentence(),
        "read": found.part or "all layers",
        "same_files": list(found.same_files),
        "closest": list(found.closest),
        "as_near_as_parents": list(found.as_near_as_parents),
        "margin_standard_errors": found.margin,
        "compared_in_full": found.compared,
        "null": "calibrated: 5 % of the units may agree by convergence, and as many as in unrelated layers",
        "candidates": [_candidate(candidate, suspect) for candidate in found.candidates],
    }


def _candidate(candidate: "Candidate", suspect: "Suspect") -> dict[str, Any]:
    from tracing_jax.library.comparison import place_name

    match = candidate.match
    return {
        "name": candidate.name,
        "model": candidate.model,
        "verdict": candidate.verdict,
        "adjusted_log10_p": candidate.adjusted_log10_p,
        "share": candidate.share,
        "parts": {**candidate.parts, _NOT_TESTED: "not_tested"},
        "tests": {
            name: {
                "log10_p": evidence.log10_p,
                "firm_log10_p": evidence.firm_log10_p,
                "agreeing": list(evidence.agreeing),
                "units": list(evidence.units),
                "distance": candidate.distances[name].mean if name in candidate.distances else None,
                "distance_standard_error": candidate.distances[name].error if name in candidate.distances else None,
                "layer_map": [
                    {"sampled_layer": i, "suspect": place_name(suspect, name, j), "agreeing": agreeing}
                    for i, j, agreeing in evidence.places
                ],
            }
            for name, evidence in (match.tests.items() if match else ())
        },
        "not_tested": dict(candidate.not_tested),
    }


def _lines(found: "Scan", suspect: "Suspect", shown: int) -> list[str]:
    """Returns the sentence and a table of the first candidates."""
    from tracing_jax.library.comparison import HEADS, place_name
    from tracing_jax.report.formatting import calibrated_p_text

    lines = [found.sentence(), ""]
    for candidate in found.candidates[:shown]:
        p = candidate.adjusted_log10_p
        word = "same files, " * (candidate.name in found.same_files) + candidate.verdict.replace("_", " ")
        lines.append(f"{candidate.name} ({candidate.model}): {word}{'' if p is None else f', {calibrated_p_text(p)}'}")
        match = candidate.match
        for name, evidence in match.tests.items() if match else ():
            agreeing = ", ".join(f"{k} of {h}" for k, h in zip(evidence.agreeing, evidence.units))
            places = "; ".join(
                f"its layer {i} is {place_name(suspect, name, j)} here" for i, j, _ in evidence.places[:8]
            )
            lines.append(
                f"    {name}: {agreeing} {'heads' if name == HEADS else 'units'} agree{f'; {places}' if places else ''}"
            )
        for name, reason in candidate.not_tested.items():
            lines.append(f"    {name}: not tested, {reason}")
    if len(found.candidates) > shown:
        lines.append(f"... and {len(found.candidates) - shown} more; --shown or --json shows them")
    lines += [
        "",
        "p: after Holm over the library; calibrated, not exact; that of heads by one zoo of small models "
        "(docs/scan.md). `compare` tests a pair in full.",
        f"Not tested: {_not_tested(found)}. A model that has these of another, and nothing else, is not found.",
    ]
    return lines


def _not_tested(found: "Scan") -> str:
    """Returns the parts of models that no test compared, and with how many signatures, where it is not all."""
    total, parts = len(found.candidates), [_NOT_TESTED]
    for part in found.candidates[0].parts:
        count = sum(candidate.parts[part] == "not_tested" for candidate in found.candidates)
        if count:
            parts.append(part if count == total else f"{part} with {count} of the {total} signatures")
    return ", ".join(parts)
