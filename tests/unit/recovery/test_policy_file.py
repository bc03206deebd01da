"""Policy files: what they may say, and the one line that each mistake gets."""

import dataclasses
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from revivemoe.cli import main as main_module
from revivemoe.cli.serve import policy_of
from revivemoe.recovery.policy import DEFAULT_LEVELS, Policy
from revivemoe.recovery.policy_file import FIELDS, SECTIONS, load_policy


def load(tmp_path: Path, text: str, base: Policy | None = None) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return load_policy(path, base or Policy())


def test_every_field_of_the_policy_can_be_set() -> None:
    named = {field_of(s, name) for s, settings in SECTIONS.items() for name in settings}
    named |= {"levels", "codes"}
    assert named == {field.name for field in dataclasses.fields(Policy)}


def field_of(section: str, name: str) -> str:
    return FIELDS.get(f"{section}.{name}") or name


OTHER = Policy(
    repair=("restart", "mask"),
    max_missing_fraction=0.125,
    serve_masked_meanwhile=True,
    max_recoveries=0,
    suspect_after_s=2.5,
    accuse_after_s=2.5,
    slow_factor=1.5,
    isolate_slow=True,
    levels=("watch", "log", "isolate", "retry", "drain", "isolate"),
    codes=(("xid-79", 4), ("node.kubernetes.io/unreachable", 0)),
)


def written(policy: Policy) -> str:
    """All settings as TOML, whose values JSON writes alike."""
    lines = []
    for section, settings in SECTIONS.items():
        lines.append(f"[{section}]")
        values = {name: getattr(policy, field_of(section, name)) for name in settings}
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    levels = [f"L{n} = {json.dumps(action)}" for n, action in enumerate(policy.levels, 1)]
    names = ("ignore", "L1", "L2", "L3", "L4", "L5", "L6")
    codes = [f"{json.dumps(code)} = {json.dumps(names[level])}" for code, level in policy.codes]
    return "\n".join([*lines, "[levels]", *levels, "[codes]", *codes])


@pytest.mark.parametrize("policy", [Policy(), OTHER, Policy(repair=())])
def test_a_policy_with_every_setting_loads_back(tmp_path: Path, policy: Policy) -> None:
    assert load(tmp_path, written(policy), base=Policy(window_s=1.0)) == policy


def test_what_is_left_out_stays(tmp_path: Path) -> None:
    base = Policy(window_s=60.0, levels=("watch", *DEFAULT_LEVELS[1:]))
    text = '[limits]\nmax_restarts = 1\n[levels]\nL4 = "isolate"\n[deadlines]\nfence_timeout_s = 3'
    expected = replace(
        base,
        max_restarts=1,
        fence_timeout_s=3.0,
        levels=("watch", "watch", "retry", "isolate", "isolate", "isolate"),
    )
    found = load(tmp_path, text, base)
    assert found == expected
    assert isinstance(found.fence_timeout_s, float)
    assert load(tmp_path, "", base) == base


def test_a_code_has_the_level_that_the_file_gives_it(tmp_path: Path) -> None:
    base = Policy(codes=(("xid-79", 3), ("xid-13", 4)))
    found = load(tmp_path, '[codes]\nxid-79 = "L1"\n"a.b/c" = "ignore"', base)
    codes = ("xid-79", "xid-13", "a.b/c", "xid-31")
    assert [found.level_of(code, 6) for code in codes] == [1, 4, 0, 6]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[experts]\nmax_missing_fractoin = 0.1", "did you mean experts.max_missing_fraction?"),
        ("[expert]\nrepair = []", "[expert] is unknown: did you mean [experts]?"),
        ("[zzz]\n", "choose one of [experts], [limits], [rejoin], [deadlines], [detection], [le"),
        ("window_s = 3", "write it below [limits]"),
        ("limits = 3", "write [limits]"),
        (
            "[limits]\nhang_factor = 2",
            "stands in the wrong table: move it to [detection]",
        ),
        ("[experts]\nmax_missing_fraction = 1.0", "must be 0 or more, and below 1"),
        ("[experts]\nmax_missing_fraction = -0.1", "must be 0 or more, and below 1"),
        ("[experts]\nmax_missing_fraction = nan", "must be a number"),
        (
            "[experts]\nmax_missing_fraction = true",
            "max_missing_fraction = true must be a number",
        ),
        ("[experts]\nserve_masked_meanwhile = 1", "must be true or false"),
        (
            '[experts]\nrepair = "mask"',
            'must be a list of "reload", "role_switch", "mask", "restart"',
        ),
        ('[experts]\nrepair = ["mask", "pray"]', "each at most once"),
        ('[experts]\nrepair = ["mask", "mask"]', "each at most once"),
        ("[experts]\nrepair = [[1]]", "each at most once"),
        ("[limits]\nmax_recoveries = 1.5", "must be a whole number"),
        ("[limits]\nmax_recoveries = -1", "must be a whole number"),
        ("[limits]\nmax_restarts = true", "must be a whole number"),
        ("[limits]\nwindow_s = 0", "limits.window_s = 0 must be above 0"),
        ("[deadlines]\nfence_timeout_s = inf", "must be a number"),
        (
            '[deadlines]\nfence_timeout_s = "10"',
            'fence_timeout_s = "10" must be a number',
        ),
        ("[detection]\nhang_factor = 0.5", "must be 1 or more"),
        ("[detection]\naccuse_after_s = 0.5", "is below suspect_after_s = 1.0: raise it"),
        ("[detection]\nsuspect_after_s = 2", "accuse_after_s = 1.3 is below"),
        ('[levels]\nL7 = "log"', "levels.L7 is unknown: the levels are L1, L2, L3, L4, L5, L6"),
        ('[levels]\nL1 = "panic"', 'must be one of "log", "watch", "retry", "drain", "isolate"'),
        ("[levels]\nL1 = []", "must be one of"),
        ("[codes]\nxid-79 = 4", 'codes.xid-79 = 4 must be one of "ignore", "L1", "L2"'),
        ('[codes]\nxid-79 = "L7"', "must be one of"),
        ("[codes]\nxid-79 = []", "must be one of"),
        ('[codes]\na.b/c = "L1"', "is not TOML"),
        ('[codes]\na.b.c = "L1"', "codes.a is a table: a code with dots must stand in quotes"),
        pytest.param(f"[limits]\nwindow_s = 1{'0' * 400}", "must be a number", id="huge"),
        pytest.param(f"[limits]\nwindow_s = 0x{'F' * 9000}", "must be a number", id="vast"),
        ("[limits]\nwindow_s = 1e300", "at most 1e+09"),
        pytest.param(f"[limits]\nmax_restarts = 1{'0' * 400}", "must be a whole", id="many"),
        pytest.param(f"[limits]\nmax_restarts = 1{'0' * 9000}", "digits", id="not read"),
        ("[levels\n", "is not TOML"),
        ("[levels]\nL1 = 2026-01-01", "must be one of"),
    ],
)
def test_each_mistake_gets_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        load(tmp_path, text)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'policy.toml'}: ")
    assert "\n" not in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    for name, said in ("no.toml", "No such file"), ("", "directory"), ("latin.toml", "UTF-8"):
        with pytest.raises(ValueError, match=said):
            load_policy(tmp_path / name, Policy())


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[experts]\nmax_missing_fraction = 0.25\n[limits]\nmax_recoveries = 2")
    assert policy_of(None, None) == Policy()
    assert policy_of(path, None) == Policy(max_missing_fraction=0.25, max_recoveries=2)
    assert policy_of(path, 0.0) == Policy(max_missing_fraction=0.0, max_recoveries=2)
    assert policy_of(None, 0.5) == Policy(max_missing_fraction=0.5)


def test_serve_refuses_a_bad_file_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[limits]\nwindow = 3")
    argv = ["revivemoe", "serve", str(tmp_path / "model"), "--recovery-policy", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        main_module.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{path}: limits.window is unknown: did you mean limits.window_s?")
