def bench() -> None:
    """later"""
