"""The rows of the power benchmark: what was done to a model, and the pairs of base and descendant that come of it.

Base models are seeds of the tiny zoo, unless a row says that they have experts or no gate. Most rows start from a
lightly fine-tuned copy. In the rows "trained on" the base is a model after a quarter of its training, trained on to up
to ten times as many tokens as it had seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import numpy as np

from benchmarks import mixtures
from benchmarks.descendants import (
    LIGHT_STEPS,
    Descendant,
    Treatment,
    disguise,
    member,
    pruned_in_depth,
    texts,
    trained,
    treatments,
)
from benchmarks.forgeries import Forgery, on_device, on_host, planted, sorted_units, widened
from benchmarks.seeds import RECIPES, Zoo, zoo
from tracing_jax.arch import Arch
from tracing_jax.sources import InMemory
from tracing_jax.tree import Tree

Pairs = list[tuple[InMemory, Descendant]]

_EARLY = 0.25  # the share of training after which a model is the base of the long training
_LONGER = (1, 3, 10)
_HARD = 1  # lengths of a whole training, at the learning rate of the base
_DEAD_UNITS = 64


@dataclass(frozen=True)
class Lineages:
    """The models behind the rows, stacked on a leading axis; each training runs when a row first asks for its outcome.

    Attributes:
      zoo_dir: the folder of the zoos; those that rows need are trained when they are first asked for.
      count: base models, and as many unrelated ones.
    """

    zoo_dir: str
    count: int

    @cached_property
    def zoo(self) -> Zoo:
        """The dense gated models, from which base models and unrelated ones come."""
        return zoo(RECIPES["tiny"], self.zoo_dir)

    @cached_property
    def experts(self) -> Zoo:
        """The models with experts."""
        return zoo(RECIPES["experts"], self.zoo_dir)

    @cached_property
    def no_gate(self) -> Zoo:
        """The models without gates."""
        return zoo(RECIPES["no_gate"], self.zoo_dir)

    @cached_property
    def bases(self) -> Tree:
        """Fully trained models."""
        return self._from_zoo(1.0, slice(self.count))

    @cached_property
    def unrelated(self) -> Tree:
        """Fully trained models of other seeds."""
        return self._from_zoo(1.0, slice(self.count, 2 * self.count))

    @cached_property
    def finetuned(self) -> dict[int, Tree]:
        """Steps -> the bases after so many steps on other text."""
        _, other = texts(self.zoo)
        return dict(trained(self.zoo, self.bases, other, self.steps, 2e-3, keep=(LIGHT_STEPS,)))

    @cached_property
    def swapped(self) -> Tree:
        """The light fine-tunes with the embeddings and head of an unrelated model, trained on on base's text."""
        own, _ = texts(self.zoo)
        models = self.finetuned[LIGHT_STEPS] | {part: self.unrelated[part] for part in ("embed", "head")}
        return dict(trained(self.zoo, models, own, self.steps // 4, 2e-3))[self.steps // 4]

    @cached_property
    def hard(self) -> Tree:
        """The bases after a training on other text, as long as their own and at its learning rate."""
        _, other = texts(self.zoo)
        steps = _HARD * self.steps
        return dict(trained(self.zoo, self.bases, other, steps, self.zoo.recipe.models.base_learning_rate))[steps]

    @cached_property
    def shortened(self) -> tuple[Arch, Tree]:
        """The light fine-tunes with new embeddings and a layer less, trained on; and their architecture."""
        own, _ = texts(self.zoo)
        models = self.finetuned[LIGHT_STEPS] | {part: self.unrelated[part] for part in ("embed", "head")}
        kept = [0, *range(2, self.zoo.arch.num_layers)]
        models |= {"layers": {str(i): models["layers"][str(source)] for i, source in enumerate(kept)}}
        arch = replace(self.zoo.arch, num_layers=len(kept), layer_ropes=self.zoo.arch.layer_ropes[1:],
                       layer_windows=self.zoo.arch.layer_windows[1:])  # fmt: skip
        return arch, dict(trained(replace(self.zoo, arch=arch), models, own, self.steps // 4, 2e-3))[self.steps // 4]

    @cached_property
    def upcycled(self) -> tuple[Arch, Tree]:
        """The light fine-tunes as mixtures of experts, trained on; and their architecture."""
        own, _ = texts(self.zoo)
        arch = mixtures.upcycled_arch(self.zoo.arch, self.experts.arch)
        models = mixtures.upcycled(self.finetuned[LIGHT_STEPS], arch, seed=0)
        return arch, dict(trained(replace(self.zoo, arch=arch), models, own, self.steps // 4, 2e-3))[self.steps // 4]

    @cached_property
    def early(self) -> Tree:
        """The bases after a share `_EARLY` of their training."""
        return self._from_zoo(_EARLY, slice(self.count))

    @cached_property
    def longer(self) -> dict[int, Tree]:
        """Factor -> the early bases trained on, on their own text, for so many times the tokens that they had seen."""
        own, _ = texts(self.zoo)
        seen = round(_EARLY * self.steps)
        keep = [factor * seen for factor in _LONGER]
        found = dict(trained(self.zoo, self.early, own, keep[-1], 4e-3, keep=keep[:-1]))
        return {steps // seen: models for steps, models in found.items()}

    @property
    def steps(self) -> int:
        """The steps of a full training."""
        return self.zoo.recipe.models.base_steps

    def rows(self) -> dict[str, Callable[[], Pairs]]:
        """Returns row -> the pairs that this was done to, made when they are called for."""
        light = f"fine-tuned, {LIGHT_STEPS / self.steps:.2g} of its training"
        named: dict[str, Callable[[], Pairs]] = {
            "independent": lambda: self._pairs(self.bases, self.unrelated),
            light: lambda: self._pairs(self.bases, self.finetuned[LIGHT_STEPS]),
            "fine-tuned, 1 of its training": lambda: self._pairs(self.bases, self.finetuned[self.steps]),
        }
        for name, treatment in treatments(self.unrelated, self.zoo.held_out).items():
            named[name] = partial(self._treated, treatment)
        named["embeddings replaced, trained on"] = lambda: self._pairs(self.bases, self.swapped)
        named["embeddings replaced, trained on, permuted"] = lambda: self._pairs(
            self.bases, self.swapped, disguise("permute")
        )
        for factor in _LONGER:
            named[f"trained on, {factor} x its tokens"] = partial(self._trained_longer, factor)
        hard = f"fine-tuned hard, {_HARD} of its training"
        permuted = disguise("permute")
        return named | {
            hard: lambda: self._pairs(self.bases, self.hard),
            f"{hard}, permuted": lambda: self._pairs(self.bases, self.hard, permuted),
            "units sorted by norm, both models": lambda: self._forged(sorted_units("up_proj"), related=True),
            "units copied, 2 each": lambda: self._forged(widened(2), related=True, both=False),
            "new vocabulary, a layer less, trained on, permuted": lambda: self._changed(self.shortened, permuted),
            "upcycled to 4 experts, trained on": lambda: self._changed(self.upcycled),
            "upcycled to 4 experts, trained on, permuted": lambda: self._changed(self.upcycled, permuted),
            **self._rows_of("experts", lambda: self.experts, {
                "experts permuted, routers moved": mixtures.experts_permuted,
                "every second expert": mixtures.experts_dropped,
                "one expert as the MLP": mixtures.expert_as_mlp,
            }),
            **self._rows_of(
                "no gate", lambda: self.no_gate,
                {"permuted": permuted, "a layer less, permuted": lambda m, i: permuted(pruned_in_depth(m, i).model, i)},
            ),
            "independent, units sorted by norm": lambda: self._forged(sorted_units("up_proj")),
            "independent, units copied, 4 each": lambda: self._forged(widened(4)),
            f"independent, {_DEAD_UNITS} dead units of the other": lambda: self._forged(planted(_DEAD_UNITS)),
        }  # fmt: skip

    def _rows_of(
        self, kind: str, models: Callable[[], Zoo], treated: dict[str, Treatment]
    ) -> dict[str, Callable[[], Pairs]]:
        """Returns rows on another zoo: independent models, light fine-tunes, and what was done to these."""

        def independent() -> Pairs:
            bases = self._of(models())
            others = jax.tree.map(lambda leaf: np.roll(leaf, 1, axis=0), bases)
            return self._paired(models().arch, bases, models().arch, others)

        def related(treatment: Treatment) -> Pairs:
            found = models()
            _, other = texts(found)
            bases = self._of(found)
            tuned = dict(trained(found, bases, other, LIGHT_STEPS, 2e-3))[LIGHT_STEPS]
            return self._paired(found.arch, bases, found.arch, tuned, treatment)

        rows: dict[str, Callable[[], Pairs]] = {f"{kind}: independent": independent}
        rows[f"{kind}: fine-tuned"] = partial(related, _as_it_is)
        return rows | {f"{kind}: {name}": partial(related, treatment) for name, treatment in treated.items()}

    def _of(self, models: Zoo) -> Tree:
        return jax.tree.map(lambda leaf: leaf[: self.count], models.models(1.0))

    def _forged(self, forgery: Forgery, related: bool = False, both: bool = True) -> Pairs:
        """Returns the pairs that a forgery makes of the bases and unrelated models, or of the bases and their tunes."""
        pairs = self._pairs(self.bases, self.finetuned[LIGHT_STEPS] if related else self.unrelated)
        forged = []
        for i, (base, ft) in enumerate(pairs):
            after = forgery(on_host(base), on_host(ft.model), np.random.default_rng(i))
            changed, descendant = map(on_device, after)
            forged.append((changed if both else base, Descendant(descendant)))
        return forged

    def _changed(self, models: tuple[Arch, Tree], treatment: Treatment | None = None) -> Pairs:
        return self._paired(self.zoo.arch, self.bases, *models, treatment)

    def _treated(self, treatment: Treatment) -> Pairs:
        return self._pairs(self.bases, self.finetuned[LIGHT_STEPS], treatment)

    def _trained_longer(self, factor: int) -> Pairs:
        return self._pairs(self.early, self.longer[factor])

    def _pairs(self, bases: Tree, models: Tree, treatment: Treatment | None = None) -> Pairs:
        return self._paired(self.zoo.arch, bases, self.zoo.arch, models, treatment)

    def _paired(
        self, arch: Arch, bases: Tree, new_arch: Arch, models: Tree, treatment: Treatment | None = None
    ) -> Pairs:
        treat = treatment or _as_it_is
        return [(member(arch, bases, i), treat(member(new_arch, models, i), 100 + i)) for i in range(self.count)]

    def _from_zoo(self, snapshot: float, which: slice) -> Tree:
        return jax.tree.map(lambda leaf: leaf[which], self.zoo.models(snapshot))


def _as_it_is(model: InMemory, _: int) -> Descendant:
    return Descendant(model)
