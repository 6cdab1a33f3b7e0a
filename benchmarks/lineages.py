"""The rows of the power benchmark: what was done to a model, and the pairs of base and descendant that come of it.

Base models are seeds of the tiny zoo. All but the last rows start from a lightly fine-tuned copy. For the last, the
base is a model after a quarter of its training, trained on to ten times as many tokens as it had seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import jax

from benchmarks.descendants import LIGHT_STEPS, Descendant, Treatment, disguise, member, texts, trained, treatments
from benchmarks.seeds import Zoo
from tracing_jax.sources import InMemory
from tracing_jax.tree import Tree

Pairs = list[tuple[InMemory, Descendant]]

_EARLY = 0.25  # the share of training after which a model is the base of the long training
_LONGER = (1, 3, 10)


@dataclass(frozen=True)
class Lineages:
    """The models behind the rows, stacked on a leading axis; each training runs when a row first asks for its outcome.

    Attributes:
      zoo: where base models and unrelated ones come from.
      count: base models, and as many unrelated ones.
    """

    zoo: Zoo
    count: int

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
        return named

    def _treated(self, treatment: Treatment) -> Pairs:
        return self._pairs(self.bases, self.finetuned[LIGHT_STEPS], treatment)

    def _trained_longer(self, factor: int) -> Pairs:
        return self._pairs(self.early, self.longer[factor])

    def _pairs(self, bases: Tree, models: Tree, treatment: Treatment = lambda model, _: Descendant(model)) -> Pairs:
        arch = self.zoo.arch
        return [(member(arch, bases, i), treatment(member(arch, models, i), 100 + i)) for i in range(self.count)]

    def _from_zoo(self, snapshot: float, which: slice) -> Tree:
        return jax.tree.map(lambda leaf: leaf[which], self.zoo.models(snapshot))
