"""Which taints of a Node a pod tolerates, as Kubernetes itself decides it. Pure.

"Taints and Tolerations" in the documentation of Kubernetes: a toleration without a key and with the
operator Exists matches every taint, one without an effect every effect.
"""

from collections.abc import Iterable, Mapping

Object = Mapping[str, object]


def tolerated_s(taint: Object, tolerations: Iterable[Object]) -> float:
    """For how long a pod with these tolerations may stay: 0 it does not tolerate the taint, or
    infinity. The first of those that match counts.
    """
    return next((_seconds(t) for t in tolerations if _matches(t, taint)), 0.0)


def _matches(toleration: Object, taint: Object) -> bool:
    effect, key = toleration.get("effect") or "", toleration.get("key") or ""
    operator = toleration.get("operator") or "Equal"
    if effect not in ("", taint.get("effect")):
        return False
    if operator == "Exists":
        return key in ("", taint.get("key"))
    same_value = (toleration.get("value") or "") == (taint.get("value") or "")
    return operator == "Equal" and bool(key) and key == taint.get("key") and same_value


def _seconds(toleration: Object) -> float:
    """Only NoExecute has a time; 0 or less is at once."""
    seconds = toleration.get("tolerationSeconds")
    if isinstance(seconds, int | float) and not isinstance(seconds, bool):
        return float(min(max(0, seconds), 1 << 60))
    return float("inf")
