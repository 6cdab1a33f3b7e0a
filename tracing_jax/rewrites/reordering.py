"""Units in another order, and tokens with other ids: every value stays as it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import PERMUTABLE, kind_of
from tracing_jax.rewrites.permutation import check_permutations, invert, random_permutations, take_units, unit_moves
from tracing_jax.rewrites.rewrite import Part, Read, Rewrite, rows_of, stream, table_of


@dataclass(frozen=True, eq=False)
class Permutation(Rewrite):
    """Units in another order: `new[i] = old[p[i]]`.

    Attributes:
      permutations: axis -> p, as in `symmetry.permutation`.
    """

    name: ClassVar[str] = "permute"
    permutations: Mapping[str, Int[np.ndarray, "*_ _"]]

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        return []

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Permutation":
        table = table_of(arch)
        kinds = {kind_of(axis) for axis in table.sizes}
        return cls(random_permutations(key, table, [kind for kind in PERMUTABLE if kind in kinds]))

    def misfits(self, arch: Arch) -> list[str]:
        try:
            check_permutations(self.permutations, table_of(arch))
        except ValueError as error:
            return [str(error)]
        return []

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        table, part = rows_of(prefix, arch), read(prefix)
        moves = {name: unit_moves(table.leaves[name], self.permutations, table.within) for name in part}
        return {name: w.having(np.asarray(take_units(w.values, *moves[name]))) for name, w in part.items()}

    def inverse(self, arch: Arch) -> "Permutation":
        return Permutation(invert(self.permutations, table_of(arch)))


@dataclass(frozen=True, eq=False)
class Renaming(Rewrite):
    """Tokens have other ids; the files of the tokenizer and the ids in the configs must change with them.

    Attributes:
      ids: `new[i] = old[ids[i]]`: the row of the embedding that stands at i afterwards.
    """

    name: ClassVar[str] = "rename"
    ids: Int[np.ndarray, " V"]

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        return []

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Renaming":
        return cls.among(key, arch, np.arange(arch.vocab_size))

    @classmethod
    def among(cls, key: PRNGKeyArray, arch: Arch, ids: Int[np.ndarray, " N"]) -> "Renaming":
        """Returns a renaming that permutes these ids at random and leaves the others."""
        renamed = np.arange(arch.vocab_size, dtype=np.int32)
        renamed[ids] = stream(key, "vocab").permutation(ids)
        return cls(renamed)

    @staticmethod
    def composed(rewrites: Iterable[Rewrite]) -> Int[np.ndarray, " V"] | None:
        """Returns the new id of each token after all renamings among the rewrites; None if there is none."""
        new_ids = None
        for renaming in (rewrite for rewrite in rewrites if isinstance(rewrite, Renaming)):
            new_ids = renaming.new_ids if new_ids is None else renaming.new_ids[new_ids]
        return new_ids

    @property
    def new_ids(self) -> Int[np.ndarray, " V"]:
        """For each id of before the id that its token has afterwards."""
        return np.argsort(self.ids).astype(np.int32)

    def misfits(self, arch: Arch) -> list[str]:
        fits = self.ids.shape == (arch.vocab_size,) and (np.sort(self.ids) == np.arange(arch.vocab_size)).all()
        return [] if fits else [f"ids are no permutation of the vocabulary's {arch.vocab_size}"]

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        rows, part = rows_of(prefix, arch).leaves, read(prefix)
        moves = {name: unit_moves(rows[name], {"vocab": self.ids}, {}) for name in part}
        return {name: w.having(np.asarray(take_units(w.values, *moves[name]))) for name, w in part.items()}

    def inverse(self, arch: Arch) -> "Renaming":
        return Renaming(self.new_ids)
