"""Requests, and the wiring of one instance. Read `engine` first."""
