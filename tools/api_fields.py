"""Writes the table of request fields into docs/api.md, from the code (`make api`)."""

import sys
from pathlib import Path

from revivemoe.server.fields import ACCEPTED, REFUSED
from revivemoe.server.schema import ChatRequest, CompletionRequest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
BEGIN, END = "<!-- fields: made by `make api` -->", "<!-- end of fields -->"


def table() -> str:
    """One line for each field: where it may be, and what is done about it."""
    lines = ["| field | completions | chat | |", "|---|---|---|---|"]
    on, chat = CompletionRequest.model_fields, ChatRequest.model_fields
    for name in sorted({*on, *chat, *ACCEPTED, *REFUSED}):
        if name in ACCEPTED:
            what = ("accepted", "accepted", f"no effect: {ACCEPTED[name].why}")
        elif name in REFUSED:
            what = ("refused", "refused", _refusal(name))
        else:
            what = (_acted(name in on), _acted(name in chat), "")
        lines.append(f"| `{name}` | {' | '.join(what)} |")
    return "\n".join(lines)


def _acted(there: bool) -> str:
    return "acted on" if there else "unknown: refused"


def _refusal(name: str) -> str:
    nothing = ("the value of `n`",) if name == "best_of" else REFUSED[name].nothing
    told = [str(one) if name == "best_of" else f"`{one!r}`" for one in nothing]
    but = f"; {' and '.join(told)}: nothing is asked for" if told else ""
    return REFUSED[name].what + but


def page(text: str) -> str:
    """The page with the table of today."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    text = PAGE.read_text()
    if "--check" in sys.argv:
        return int(text != page(text))
    PAGE.write_text(page(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
