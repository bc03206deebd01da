"""Which addresses a server may be given, and what it says of those it cannot have."""

import socket

import pytest

from revivemoe.server.run import bind


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_names_and_numbers(host: str) -> None:
    with bind(host, 0) as bound:
        assert bound.getsockname()[1] > 0


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::", "::1"])
def test_addresses_of_ipv6(host: str) -> None:
    try:
        bound = bind(host, 0)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with bound:
        assert bound.family == socket.AF_INET6


def test_a_name_has_the_first_address_that_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.1 is nobody's."""
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*kind, ("192.0.2.1", 0)), (*kind, ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: found)
    with bind("localhost", 0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: found[:1])
    with pytest.raises(OSError, match="cannot listen on far:0: Cannot assign requested address"):
        bind("far", 0)


def test_a_name_that_nobody_knows_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **more: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    said = (
        "cannot listen on nonsense.invalid:8000: Name or service not known; choose another --host"
    )
    with pytest.raises(OSError, match=said):
        bind("nonsense.invalid", 8000)
