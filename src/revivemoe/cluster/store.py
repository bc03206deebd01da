"""The rendezvous store of gloo and NCCL domains. Lives with the engine, never on a rank."""

import socket


class GroupStore:
    """Owns a TCP store server on the loopback interface. `start` imports torch (seconds)."""

    def __init__(self) -> None:
        self._server: object | None = None
        self.address: str | None = None

    def start(self) -> None:
        from torch.distributed import TCPStore

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            listen_fd = socket.dup(probe.fileno())
            port = probe.getsockname()[1]
        self._server = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listen_fd,
            use_libuv=True,
        )
        self.address = f"127.0.0.1:{port}"

    def close(self) -> None:
        self._server = None
