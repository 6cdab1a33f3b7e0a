"""What could be gained by a made-up signature: random rows, or rows chosen by how models of others respond to them.

    python -m benchmarks.made_up      # half a minute on two cores, once the zoo is trained

The adversary knows the rule, the token strings and many public models of the kind of the suspect, but neither the
suspect nor a relative of it. A unit of a made-up signature gains if the suspect's unit that responds most like its gate
row is also the one that responds most like its up row. Rows of several kinds are ranked by how often that happens in
the public models; the 64 best that differ from one another make the signature, and it is compared with models that the
adversary has not seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from absl import app, flags
from jaxtyping import Float, Int

from benchmarks.descendants import member
from benchmarks.scan import signature, small_zoo, vocabulary
from tracing_jax.library import Signature, SignatureTest, Suspect, compare, drawing, read_suspect
from tracing_jax.library.comparison import RESPONSES, normalised
from tracing_jax.library.signature import as_int8
from tracing_jax.report import text_table

_TARGETS = flags.DEFINE_integer("targets", 6, "models that the adversary has not seen")

_ALIKE = 0.6  # correlation of two rows, of which the second is not taken
_RANDOM = 4000


@dataclass(frozen=True)
class Rows:
    """Candidates for a made-up signature: the gate and up responses of N units, and the public model they are of."""

    gate: Float[np.ndarray, "N S"]
    up: Float[np.ndarray, "N S"]
    source: Int[np.ndarray, " N"]

    def __getitem__(self, which: np.ndarray | Sequence[int]) -> "Rows":
        return Rows(self.gate[which], self.up[which], self.source[which])


def candidates(public: Sequence[Suspect], num_tokens: int) -> Mapping[str, Rows]:
    """Returns kinds of rows that an adversary could take, of length one."""
    layers = [(i, layer) for i, model in enumerate(public) for layer in model.layers]
    gate, up = (np.concatenate([normalised(layer[kind]) for _, layer in layers]) for kind in ("gate", "up"))
    source = np.concatenate([np.full(len(layer["gate"]), i) for i, layer in layers])
    drawn = normalised(np.random.default_rng(0).normal(size=(_RANDOM, num_tokens)))
    single = normalised(np.eye(num_tokens, dtype=np.float32))
    unassigned = np.full(_RANDOM, -1)
    return {
        "units of public models": Rows(gate, up, source),
        "gate rows of these, as both": Rows(gate, gate, source),
        "up rows of these, as both": Rows(up, up, source),
        "random rows, as both": Rows(drawn, drawn, unassigned),
        "responses to one token, as both": Rows(single, single, unassigned[:num_tokens]),
    }


def votes(rows: Rows, public: Sequence[Suspect]) -> Float[np.ndarray, " N"]:
    """Returns the share of the layers of public models in which both rows of a unit have the same closest unit."""
    found = np.zeros(len(rows.source))
    for i, model in enumerate(public):
        for layer in model.layers:
            by_gate = (rows.gate @ normalised(layer["gate"]).T).argmax(axis=1)
            by_up = np.abs(rows.up @ normalised(layer["up"]).T).argmax(axis=1)
            found += (by_gate == by_up) & (rows.source != i)
    return found / sum(len(model.layers) for model in public)


def chosen(rows: Rows, by: Float[np.ndarray, " N"]) -> Rows:
    """Returns the rows with the most votes of which no two are alike, as many as a layer of a signature has."""
    taken: list[int] = []
    for i in np.argsort(-by, kind="stable").tolist():
        if not taken or np.abs(rows.gate[taken] @ rows.gate[i]).max() < _ALIKE:
            taken.append(i)
        if len(taken) == drawing.UNITS:
            break
    return rows[taken]


def made_up(like: Signature, rows: Rows) -> Signature:
    """Returns a signature that has these rows in every sampled layer."""
    readings, units = {"gate": as_int8(rows.gate), "up": as_int8(rows.up)}, np.arange(len(rows.source), dtype=np.int32)
    layers = (replace(layer, units=units, readings=readings, moments={}, covariances={}) for layer in like.layers)
    return replace(like, layers=tuple(layers))


def gained(found: Signature, targets: Sequence[Suspect]) -> list[SignatureTest]:
    """Returns what the signature shows against each of the models."""
    return [compare(found, target).tests[RESPONSES] for target in targets]


def main(argv: list[str]) -> None:
    """Prints what each kind of made-up signature gains."""
    del argv
    jax.config.update("jax_platforms", "cpu")
    zoo = small_zoo("tiny")
    params, count = zoo.models(1.0), zoo.recipe.num_seeds
    own = signature("adversary", member(zoo.arch, params, count - 1))
    words = vocabulary(zoo.arch.vocab_size)
    models = [read_suspect(member(zoo.arch, params, i), words, own.tokens) for i in range(count - 1)]
    targets, public = models[: _TARGETS.value], models[_TARGETS.value :]
    kinds = candidates(public, len(own.tokens))
    best = {name: chosen(rows, votes(rows, public)) for name, rows in kinds.items()}
    both = [np.concatenate([getattr(rows, side) for rows in best.values()]) for side in ("gate", "up", "source")]
    best["the best of all these"] = chosen(Rows(*both), votes(Rows(*both), public))
    table = []
    for name, rows in best.items():
        found = gained(made_up(own, rows), targets)
        most = max(max(evidence.agreeing) for evidence in found)
        least = min(evidence.log10_p for evidence in found)
        table.append([name, len(rows.source), f"{votes(rows, public).mean():.3f}", most, f"{least:.1f}"])
    print(f"{len(targets)} suspects, {len(public)} public models")
    print(text_table(table, ["rows", "units", "agree in public models", "most that agree in a suspect", "log10 p"]))


if __name__ == "__main__":
    app.run(main)
