"""Which layer of ft comes from which layer of base: the assignment of layers, in data and in one sentence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tracing_jax.matching import assign


@dataclass(frozen=True)
class LayerMap:
    """Layers of base and of ft that belong together.

    Attributes:
      pairs: (layer of base, layer of ft), each layer once, in base's order.
      copies: (layer of base, layer of ft) for layers of ft that are left over and resemble a layer that has a partner
        already: a stretched model repeats layers.
      unmatched_base, unmatched_ft: layers that resemble none.
    """

    pairs: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, int], ...]
    unmatched_base: tuple[int, ...]
    unmatched_ft: tuple[int, ...]


def assign_layers(log_p: Float[np.ndarray, "L L2"], log_level: float) -> LayerMap:
    """Returns the assignment of layers with the strongest evidence in sum; no pair at or above the level is made.

    Args:
      log_p: natural log p-value of each pair of layers.
      log_level: the level of one pair, already divided by the number of pairs.
    """
    gain = np.maximum(log_level - log_p, 0.0)
    if gain.shape[0] <= gain.shape[1]:
        found = list(enumerate(assign(gain).tolist()))
    else:
        found = [(i, j) for j, i in enumerate(assign(gain.T).tolist())]
    pairs = tuple(sorted((int(i), int(j)) for i, j in found if gain[i, j] > 0))
    taken = {j for _, j in pairs}
    left = [j for j in range(gain.shape[1]) if j not in taken]
    copies = tuple((int(gain[:, j].argmax()), j) for j in left if gain[:, j].max() > 0)
    alike = {i for i, _ in pairs} | {i for i, _ in copies}
    return LayerMap(
        pairs,
        copies,
        tuple(i for i in range(gain.shape[0]) if i not in alike),
        tuple(j for j in left if not gain[:, j].max() > 0),
    )


def sentence(found: LayerMap, num_base: int, num_ft: int, kept: Sequence[tuple[int, int]]) -> str:
    """Returns the map in words; `kept` holds for each pair the units that came back, and all of ft's units."""
    if not found.pairs:
        return f"None of ft's {num_ft} layers resembles a layer of base beyond what independent models share."
    in_order = all(a[1] < b[1] for a, b in zip(found.pairs, found.pairs[1:]))
    words = [
        f"{len(found.pairs)} of ft's {num_ft} layers come from base's {num_base}, "
        f"{'in order' if in_order else 'not in order'} ({_runs(found.pairs)})"
    ]
    if found.copies:
        words.append("ft's " + ", ".join(f"layer {j} repeats base's {i}" for i, j in found.copies))
    if found.unmatched_base:
        words.append(f"base's {ranges(found.unmatched_base)} left no trace")
    if found.unmatched_ft:
        words.append(f"nothing of base resembles ft's {ranges(found.unmatched_ft)}")
    share = [f"{k} of {h}" for k, h in kept]
    if len(set(share)) == 1:
        words.append(f"in each matched layer {share[0]} units were found again")
    else:
        total = sum(k for k, _ in kept), sum(h for _, h in kept)
        words.append(f"in the matched layers {total[0]} of {total[1]} units were found again")
    return "; ".join(words) + "."


def ranges(numbers: Iterable[int]) -> str:
    """Returns the numbers as ranges: `layers 0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {shown}"


def _runs(pairs: Sequence[tuple[int, int]]) -> str:
    """Returns the pairs with neighbours drawn together: `base 0-3 -> ft 0-3, base 6 -> ft 4`."""
    runs: list[list[tuple[int, int]]] = []
    for pair in pairs:
        if runs and pair == (runs[-1][-1][0] + 1, runs[-1][-1][1] + 1):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    sides = [[ranges(pair[side] for pair in run).split(" ", 1)[1] for side in (0, 1)] for run in runs]
    return ", ".join(f"base {base} → ft {ft}" for base, ft in sides)
