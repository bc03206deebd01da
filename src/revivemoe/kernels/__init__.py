"""The arithmetic of a step: `transformers`' and torch's own, or this package's where it is faster.

`library` builds and opens `kernels.cpp`; `native` calls it with tensors; `choice` decides.
"""
