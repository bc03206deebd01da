"""Variables of this process's environment, for libraries that are told in no other way."""

import os
from collections.abc import Mapping


def set_variables(values: Mapping[str, str]) -> None:
    """Before the library looks; processes started later inherit them."""
    os.environ.update(values)
