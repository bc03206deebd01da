"""The rank process: torch around `core.rank`. Never imports `recovery`."""
