"""One attention rank's host side: sequences, blocks, journal, scheduler, step state machine.

No torch, no clock, no I/O: the simulation drives exactly this code.
"""
