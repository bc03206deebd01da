"""schemathesis goes by the served OpenAPI document: right and wrong bodies by the hundred."""

import pytest
from support.fuzz import RIGHT, WRONG, fuzz, labels

EXAMPLES = 30
POSTED = [
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /v1/fault_tolerance/apply",
    "POST /v1/fault_tolerance/inject",
    "POST /tokenize",
    "POST /detokenize",
]
TWINS = {"POST /fault_tolerance/apply"}
"""Answered by the same code."""


@pytest.mark.parametrize("label", POSTED)
@pytest.mark.parametrize("mode", [RIGHT, WRONG], ids=["right", "wrong"])
def test_a_body_is_taken_or_refused_as_the_document_says(server, label, mode):
    assert fuzz(server.url, label, mode, EXAMPLES) >= EXAMPLES // 2


def test_the_rest_needs_no_body(server):
    rest = [one for one in labels(server.url) if one not in {*POSTED, *TWINS}]
    assert len(rest) >= 10
    for label in rest:
        assert label.startswith("GET "), label
        if not label.endswith("/events"):
            fuzz(server.url, label, RIGHT, 10)
