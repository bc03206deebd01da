"""Bodies that the served OpenAPI document allows or forbids, by schemathesis."""

from collections.abc import Callable

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
)

CHECKS = [
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
]
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


def labels(url: str) -> list[str]:
    """Method and path of every operation."""
    return list(_operations(url))


def fuzz(
    url: str,
    label: str,
    mode: GenerationMode,
    examples: int,
    alter: Callable[[Case], None] = lambda case: None,
) -> int:
    """Send so many to an operation, check each answer against the document; returns how many."""
    sent = 0

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=_operations(url)[label].as_strategy(generation_mode=mode))
    def tried(case: Case) -> None:
        nonlocal sent
        alter(case)
        case.call_and_validate(checks=CHECKS, timeout=30)
        sent += 1

    tried()
    return sent


def _operations(url: str) -> dict[str, schemathesis.APIOperation]:
    document = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=10)
    found = [result.ok() for result in document.get_all_operations()]
    return {operation.label: operation for operation in found}
