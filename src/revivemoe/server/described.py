"""The OpenAPI document's part on bodies: routes read them themselves, so FastAPI cannot tell."""

from collections.abc import Mapping
from typing import TypeAlias

from pydantic import BaseModel

from revivemoe.server.fields import ACCEPTED, JSON_TYPES

Schema: TypeAlias = dict[str, object]

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    400: "The request is wrong; the error says how",
    401: "The key is missing or wrong",
    403: "Not allowed",
    404: "No such model",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The content type is not JSON",
    503: "Not now; `Retry-After` says when",
}


def errors() -> dict[int | str, dict[str, object]]:
    """What any route may answer beside what was asked for."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": why, "content": content} for status, why in _STATUSES.items()}


def body(*forms: type[BaseModel], generation: bool = False) -> Schema:
    """A JSON object of one of these forms. `generation`: with the fields that have no effect."""
    schemas = [_schema(form, generation) for form in forms]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _schema(form: type[BaseModel], generation: bool) -> Schema:
    document = form.model_json_schema()
    inlined = _inlined(document, document.pop("$defs", {}))
    assert isinstance(inlined, dict)
    required = inlined.get("required", [])
    properties = inlined["properties"] = {
        name: schema if name in required else _or_null(schema)
        for name, schema in inlined["properties"].items()
    }
    if generation:
        properties |= {name: {"type": _types(name)} for name in ACCEPTED}
    return inlined


def _or_null(schema: Schema) -> Schema:
    """`null` is as if the field were left out."""
    return {"anyOf": [schema, {"type": "null"}]}


def _types(name: str) -> list[str]:
    return [*(JSON_TYPES[kind] for kind in ACCEPTED[name].kinds), "null"]


def _inlined(value: object, definitions: Mapping[str, object]) -> object:
    """Without references: a definition's place in the whole document is not known here."""
    if isinstance(value, list):
        return [_inlined(one, definitions) for one in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inlined(definitions[value["$ref"].rsplit("/", 1)[1]], definitions)
    return {name: _inlined(one, definitions) for name, one in value.items()}
