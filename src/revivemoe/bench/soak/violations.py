"""What must not happen in a soak, as far as it did; one line each."""

import time


class Violation(Exception):
    """After which there is no point in going on."""


class Violations:
    """With the time of day, and what was under way."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.during = "the start"
        """The latest fault."""

    def add(self, text: str) -> None:
        at = time.strftime("%H:%M:%S")
        self.lines.append(f"{at} {' '.join(text.split())} (latest: {self.during})")
