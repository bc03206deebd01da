"""Every MoE architecture of the installed `transformers`: served as `generate` answers, or refused
in one line. Writes what came out into docs/models.md (`make test-models`, half a minute).
"""

from pathlib import Path

import pytest
from support.families import VARIANTS, Verdict, judge, moe_types
from support.models_page import PAGE, page

pytestmark = pytest.mark.models
VERDICTS: dict[str, Verdict] = {}


@pytest.mark.parametrize("name", [*moe_types(), *VARIANTS])
def test_it_is_equal_or_refused(name: str, tmp_path: Path) -> None:
    verdict = judge(name, tmp_path / "model")
    assert not verdict.wrong
    assert verdict.equal != bool(verdict.refusal)
    VERDICTS[name] = verdict


def test_the_page_is_written() -> None:
    """Only of a walk that came through whole."""
    assert list(VERDICTS) == [*moe_types(), *VARIANTS], "not every family has been judged"
    PAGE.write_text(page(VERDICTS.values()))
