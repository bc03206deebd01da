"""ReviveMoE: serve Mixture-of-Experts models and recover from device failures in place."""

__version__ = "0.1.0"
