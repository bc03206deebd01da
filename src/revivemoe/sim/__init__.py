"""Deterministic simulation: the real engine and the real rank state machine in one thread.

Only transport, forward and process start are fake. Everything that happens follows from a seed.
No torch, no sockets, no processes, no clock of the machine.
"""
