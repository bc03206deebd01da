def demo() -> None:
    """later"""
