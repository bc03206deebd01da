"""The failure decision and its execution. No torch, no clock, no I/O, nothing of one engine.

A host engine meets this package through two protocols (`ports`): reach a rank, and tell and ask
the owner of the sequences.
"""
