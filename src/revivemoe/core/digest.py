"""Names for KV content: a chain of digests over full blocks of token history.

KV depends on every earlier token and on which experts were masked while it was computed. So the
digest of a block covers its tokens and its parent's digest, and the root covers the mask key.
"""

from array import array
from hashlib import blake2b
from typing import NewType

Digest = NewType("Digest", bytes)
"""Name of one full block's KV: its tokens, all tokens before it, and the mask key."""

_DIGEST_BYTES = 16


def _root(mask_key: bytes) -> Digest:
    # Hashed, so that a key can never be mistaken for a parent digest followed by tokens.
    return Digest(blake2b(mask_key, digest_size=_DIGEST_BYTES, person=b"mask key").digest())


def _child(parent: Digest, tokens: list[int]) -> Digest:
    payload = parent + array("i", tokens).tobytes()
    return Digest(blake2b(payload, digest_size=_DIGEST_BYTES).digest())


def extend_chain(
    chain: list[Digest], mask_key: bytes, history: list[int], block_size: int, num_blocks: int
) -> None:
    """Append to `chain` until it names the first `num_blocks` full blocks of `history`."""
    assert num_blocks * block_size <= len(history), "only full blocks have a name"
    for index in range(len(chain), num_blocks):
        parent = chain[-1] if chain else _root(mask_key)
        chain.append(_child(parent, history[index * block_size : (index + 1) * block_size]))
