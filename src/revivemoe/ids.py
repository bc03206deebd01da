"""Distinct integer types, so that a rank is never passed where a slot is meant."""

from typing import NewType

RankId = NewType("RankId", int)
"""A rank for life. Never reused, never renumbered."""
Incarnation = NewType("Incarnation", int)
"""Counts the processes that have borne one rank id, from 1."""
LogicalRank = NewType("LogicalRank", int)
"""Dense index of a member inside one epoch's domain."""
Epoch = NewType("Epoch", int)
"""Generation of the membership. Topology, placement and domain belong to one."""
LayerId = NewType("LayerId", int)
"""Decoder layer of the model."""
ExpertId = NewType("ExpertId", int)
"""Routed expert within its layer."""
SlotId = NewType("SlotId", int)
"""Index of an expert buffer on one rank and layer."""
SeqId = NewType("SeqId", int)
"""One generated sequence (one choice of one prompt); unique for the life of the engine."""
BlockId = NewType("BlockId", int)
"""One KV block of one rank."""
