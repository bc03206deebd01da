"""A request's values as error messages may hold them: never more than a line."""

from collections.abc import Iterator

_SHOWN = 80


def brief(value: object) -> str:
    """A JSON value. Only what is shown is looked at."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > _SHOWN:
            break
    return shortened(text)


def shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _pieces(value: object) -> Iterator[str]:
    """`repr(value)`, piece by piece; of a string no more than can be shown."""
    match value:
        case str():
            yield repr(value[: _SHOWN + 1])
        case list():
            yield "["
            for k, item in enumerate(value):
                yield ", " if k else ""
                yield from _pieces(item)
            yield "]"
        case dict():
            yield "{"
            for k, (name, item) in enumerate(value.items()):
                yield ", " if k else ""
                yield from _pieces(name)
                yield ": "
                yield from _pieces(item)
            yield "}"
        case _:
            yield repr(value)
