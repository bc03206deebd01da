"""The server in a thread of its own, in front of a fake engine."""

from unit.server.conftest import (  # noqa: F401
    client,
    engine,
    http,
    server,
    shared_server,
    start_server,
    tokenizer,
)
