"""A `Policy` from a TOML file: what `--recovery-policy FILE` reads.

One table per group of settings (`SECTIONS`); what the file leaves out keeps its default. Every
error is one line that names the file, the setting and the mend.
"""

import difflib
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from revivemoe.recovery.policy import (
    DEFAULT_LEVELS,
    LEVEL_ACTIONS,
    REPAIRS,
    LevelAction,
    Policy,
)

T = TypeVar("T")
LEVEL_NAMES = tuple(f"L{number}" for number in range(1, len(DEFAULT_LEVELS) + 1))
IGNORE = "ignore"
MAX_COUNT, MAX_SECONDS = 1_000_000, 1e9
"""More than that is for ever, and what is reckoned with it stays finite."""
Check = Callable[[object], object]
"""The value as `Policy` keeps it. Raises ValueError: what it must be."""


def _number(value: object) -> float:
    """bool is an int to Python, and TOML has inf and nan."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not _has_a_float(value):
        raise ValueError("must be a number")
    return float(value)


def _has_a_float(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of more than 308 digits
        return False


def _bounded(holds: Callable[[float], bool], must: str) -> Callable[[object], float]:
    def check(value: object) -> float:
        number = _number(value)
        if not holds(number):
            raise ValueError(f"must be {must}")
        return number

    return check


_seconds = _bounded(
    lambda seconds: 0 < seconds <= MAX_SECONDS, f"above 0, and at most {MAX_SECONDS:.0e} (seconds)"
)
_fraction = _bounded(lambda fraction: 0 <= fraction < 1, "0 or more, and below 1")
_factor = _bounded(lambda factor: factor >= 1, "1 or more")


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"must be a whole number from 0 to {MAX_COUNT}")
    return value


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _repairs(value: object) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [None]
    known = all(isinstance(v, str) and v in REPAIRS for v in given)
    if not known or len(set(given)) < len(given):
        raise ValueError(f"must be a list of {_quoted(REPAIRS)}, each at most once")
    return tuple(given)


def _action(value: object) -> LevelAction:
    for action in LEVEL_ACTIONS:
        if value == action:
            return action
    raise ValueError(f"must be one of {_quoted(LEVEL_ACTIONS)}")


def _level(value: object) -> int:
    if value == IGNORE:
        return 0
    if value not in LEVEL_NAMES:
        raise ValueError(f"must be one of {_quoted((IGNORE, *LEVEL_NAMES))}")
    return 1 + LEVEL_NAMES.index(value)


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)


SECTIONS: dict[str, dict[str, Check]] = {
    "experts": {
        "repair": _repairs,  # what to try, in this order, for experts without a live replica
        "max_missing_fraction": _fraction,  # share of a layer's experts that may be masked
        "serve_masked_meanwhile": _switch,  # serve on, masked, while experts are reloaded
        "restore_redundancy": _switch,  # fill empty slots with second replicas afterwards
    },
    "limits": {
        "max_recoveries": _count,  # in a row without a step forward: restart all ranks
        "window_s": _seconds,  # the window, seconds
        "max_restarts": _count,  # in a row without a step forward: stop and say so
        "max_retries": _count,  # that one device asks for within the window; then it is drained
    },
    "rejoin": {
        "auto": _switch,  # lost ranks come back by themselves
        "after_s": _seconds,  # the first time; twice as long every further time in a row
        "at_most_s": _seconds,  # the longest wait between two attempts
        "max_attempts": _count,  # in a row; then the rank is left to the operator
        "settled_after_s": _seconds,  # a member for so long: its attempts are forgotten
    },
    "deadlines": {
        "fence_timeout_s": _seconds,  # for survivors to roll back and acknowledge
        "boundary_timeout_s": _seconds,  # for members to stop at a step boundary together
        "resume_timeout_s": _seconds,  # for members to agree on the first step after
        "reload_timeout_s": _seconds,  # for experts to be loaded into spare slots
        "restart_timeout_s": _seconds,  # for restarted ranks to be ready
        "drain_timeout_s": _seconds,  # for a drained rank's sequences to be warm elsewhere
        "spawn_timeout_s": _seconds,  # for a process to come into being, and for its first word
        "join_timeout_s": _seconds,  # for a rank that has loaded to be taken in
        "leave_timeout_s": _seconds,  # for a rank told to stop to be gone; then it is killed
        "corpse_timeout_s": _seconds,  # for a killed process to be gone; plans wait so long
        "trial_timeout_s": _seconds,  # for a suspect request to get on by a token when tried
    },
    "detection": {
        "suspect_after_s": _seconds,  # silence that makes a rank suspect; beats: 0.1 s
        "accuse_after_s": _seconds,  # silence that accuses it; not below suspect_after_s
        "doubt_s": _seconds,  # for which the engine doubts itself if most ranks are silent
        "hang_after_s": _seconds,  # least time without progress that is a hang
        "hang_factor": _factor,  # overdue after this many times what its rows predict
        "first_work_s": _seconds,  # what work of a kind never seen before may take
        "symptom_grace_s": _seconds,  # how long an aborted step waits for a culprit
        "repeat_window_s": _seconds,  # a symptom twice within this time is a rank's fault
        "slow_factor": _factor,  # slow: this many times what the work takes its peers
        "slow_after_s": _seconds,  # ... for so long
        "isolate_slow": _switch,  # take slow ranks out, or only report them
    },
}
"""TOML table -> name -> setting. Tables with names of their own: `levels`, L1 to L6 (each with an
action); `codes`, codes of device faults (each with the level that it has here, or "ignore")."""

FIELDS = {
    "rejoin.auto": "auto_rejoin",
    "rejoin.after_s": "rejoin_after_s",
    "rejoin.at_most_s": "rejoin_at_most_s",
    "rejoin.max_attempts": "max_rejoins",
}
"""Settings whose field in `Policy` has another name."""

LEVELS, CODES = "levels", "codes"


def load_policy(path: Path, base: Policy) -> Policy:
    """`base` with what the file sets. Raises ValueError: one line, with the file's name."""
    try:
        return parse_policy(_read(path), base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text: save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"is not TOML: {error}") from None


def parse_policy(document: Mapping[str, object], base: Policy) -> Policy:
    """`base` with what a parsed document sets. Raises ValueError: one line."""
    values: dict[str, Any] = {}  # each is of its field's type: `check` sees to that
    for section, content in document.items():
        if section not in (*SECTIONS, LEVELS, CODES):
            raise ValueError(_unknown_section(section))
        if not isinstance(content, dict):
            raise ValueError(f"{section} must be a table: write [{section}]")
        if section == LEVELS:
            values["levels"] = _levels(content, base)
            continue
        if section == CODES:
            values["codes"] = _codes(content, base)
            continue
        for name, value in content.items():
            if name not in SECTIONS[section]:
                raise ValueError(_unknown_name(section, name))
            where = f"{section}.{name}"
            values[FIELDS.get(where) or name] = _checked(where, value, SECTIONS[section][name])
    policy = replace(base, **values)
    _check_together(policy)
    return policy


def _levels(content: Mapping[str, object], base: Policy) -> tuple[LevelAction, ...]:
    """The levels that the table leaves out keep their action."""
    levels = list(base.levels)
    for name, value in content.items():
        if name not in LEVEL_NAMES:
            known = ", ".join(LEVEL_NAMES)
            raise ValueError(f"{LEVELS}.{name} is unknown: the levels are {known}")
        levels[LEVEL_NAMES.index(name)] = _checked(f"{LEVELS}.{name}", value, _action)
    return tuple(levels)


def _codes(content: Mapping[str, object], base: Policy) -> tuple[tuple[str, int], ...]:
    """The codes that the table leaves out keep their level."""
    levels = dict(base.codes)
    for code, value in content.items():
        if isinstance(value, dict):
            raise ValueError(f"{CODES}.{code} is a table: a code with dots must stand in quotes")
        levels[code] = _checked(f"{CODES}.{code}", value, _level)
    return tuple(levels.items())


def _checked(where: str, value: object, check: Callable[[object], T]) -> T:
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"{where} = {_shown(value)} {error}") from None


def _check_together(policy: Policy) -> None:
    if policy.accuse_after_s < policy.suspect_after_s:
        raise ValueError(
            f"detection.accuse_after_s = {policy.accuse_after_s} is below suspect_after_s = "
            f"{policy.suspect_after_s}: raise it, or lower suspect_after_s"
        )


def _unknown_section(name: str) -> str:
    for section, settings in SECTIONS.items():
        if name in settings:
            return f"{name} belongs into a table: write it below [{section}]"
    return f"[{name}] is unknown: {_nearest(name, [*SECTIONS, LEVELS, CODES], '[{}]')}"


def _unknown_name(section: str, name: str) -> str:
    for other, settings in SECTIONS.items():
        if name in settings:
            return f"{section}.{name} stands in the wrong table: move it to [{other}]"
    everywhere = [f"{s}.{n}" for s, settings in SECTIONS.items() for n in settings]
    return f"{section}.{name} is unknown: {_nearest(f'{section}.{name}', everywhere, '{}')}"


def _nearest(name: str, known: list[str], form: str) -> str:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if found:
        return f"did you mean {form.format(found[0])}?"
    return f"choose one of {', '.join(form.format(k) for k in known)}"


def _shown(value: object) -> str:
    """As TOML writes it; what TOML cannot hold in one line, cut short."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"')[:80] + '"'
        case list() | tuple():
            return f"[{', '.join(_shown(v) for v in value)}]"[:200]
        case int() if abs(value) >= 10**80:
            return hex(value)[:80]  # Python writes no very long one in decimal
        case _:
            return repr(value)[:80]
