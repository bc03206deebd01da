"""Which ranks share the dense feed-forward layers: tensor-parallel groups, replicated. A value.

Paper: the first layers of DeepSeek-V3 style models are dense; their feed-forward part is cut into
T shards, one for each rank of a group. A group that has lost a shard is compromised as a whole;
tokens are spread evenly over the healthy groups.
"""

import msgspec

from revivemoe.ids import RankId

Group = tuple[RankId, ...]
"""The rank that holds shard 0, the one that holds shard 1, ...; one rank may hold several."""


class DenseGroups(msgspec.Struct, frozen=True):
    """All groups there are, healthy or not."""

    size: int
    """T: shards of a layer."""
    home: tuple[Group, ...]
    """As formed at the start. A rank's process begins with the shard it has here."""
    extra: tuple[Group, ...] = ()
    """Formed of survivors since, when no other group was healthy."""

    def healthy(self, attention: tuple[RankId, ...]) -> tuple[Group, ...]:
        """Groups all of whose ranks have the attention role now."""
        present = set(attention)
        return tuple(g for g in (*self.home, *self.extra) if set(g) <= present)

    def shards_of(self, rank: RankId, attention: tuple[RankId, ...]) -> frozenset[int]:
        """Shards that the healthy groups expect `rank` to hold."""
        groups = self.healthy(attention)
        return frozenset(s for g in groups for s, holder in enumerate(g) if holder == rank)

    def without(self, gone: frozenset[RankId]) -> "DenseGroups":
        """The groups once the processes of `gone` are no more, or have no attention role any more.

        A process that comes back has only what it starts with: no part in an extra group.
        """
        extra = tuple(g for g in self.extra if not set(g) & gone)
        return msgspec.structs.replace(self, extra=extra)

    def completed(self, attention: tuple[RankId, ...]) -> "DenseGroups":
        """With at least one healthy group: if none is left, one of the present attention ranks."""
        if self.healthy(attention) or not attention:
            return self
        spread = tuple(attention[shard % len(attention)] for shard in range(self.size))
        return msgspec.structs.replace(self, extra=(*self.extra, spread))


def form_groups(attention: tuple[RankId, ...], size: int) -> DenseGroups:
    """As many groups of `size` as there are ranks for; those left over hold no shard.

    Raises ValueError if there are too few for one group.
    """
    if len(attention) < size:
        raise ValueError(
            f"--dense-ffn-tp {size} is more than the {len(attention)} attention ranks: lower it, "
            "or raise --data-parallel-size"
        )
    whole = len(attention) // size
    return DenseGroups(size, tuple(attention[i * size : (i + 1) * size] for i in range(whole)))
