"""The engine under asyncio with real processes."""
