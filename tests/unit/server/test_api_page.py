"""docs/api.md tells of the fields there are."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_page_is_of_today():
    command = [sys.executable, ROOT / "tools" / "api_fields.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run `make api`"
