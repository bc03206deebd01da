"""A server on a host that gives it little: as a container may run it. Needs root."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from support.memory_limit import CannotLimit, limited

from revivemoe.bench.server_process import ServerProcess

UID = 12345
"""No line of /etc/passwd has it."""
NAMESPACES = ["unshare", "--mount", "--uts", "sh", "-ec"]
HOST = f"""
read go
hostname nonsense.invalid
mount --make-rprivate /
for at in $(awk '$2 !~ "^/(proc|sys|dev)" {{print $2}}' /proc/mounts | sort -u); do
    mount -o remount,bind,ro "$at" 2>/dev/null || true
done
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
cp -r "$1" /dev/shm/model
chmod -R a+rX /dev/shm/model
! touch "$1/written" 2>/dev/null
shift
exec setpriv --reuid {UID} --regid 0 --clear-groups \
    --inh-caps +dac_read_search --ambient-caps +dac_read_search \
    env -i PATH="$PATH" PYTHONDONTWRITEBYTECODE=1 "$@"
"""
"""Its own name is unknown to it, nothing can be written but /dev/shm, and its user has no name, no
home and no variables. It may read all files: the interpreter may lie in somebody's home."""


class UnkindHost(ServerProcess):
    """In a memory cgroup, too. Raises CannotLimit where the machine allows none of this."""

    def __init__(self, model_dir: Path, mebibytes: int, *flags: str) -> None:
        """Its model is called "model"."""
        super().__init__(Path("/dev/shm/model"), flags)
        self._mebibytes, self._model_dir = mebibytes, model_dir
        self._limits = ExitStack()

    def _launch(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "revivemoe.cli.main", *self._arguments]
        return self.run(command, self._log.fileno())

    def run(self, command: Sequence[str], out: int) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [*NAMESPACES, HOST, "sh", str(self._model_dir), *command],
            stdin=subprocess.PIPE, stdout=out, stderr=out,
        )  # fmt: skip
        assert process.stdin is not None
        with process.stdin:
            self._limits.enter_context(limited({"revivemoe-unkind": process.pid}, self._mebibytes))
            process.stdin.write(b"go\n")
        return process

    def check(self) -> None:
        """Raises CannotLimit with what the machine refuses."""
        with open(self._log.name, "wb") as out, self._limits:
            if self.run(["true"], out.fileno()).wait():
                raise CannotLimit(f"no such host can be made here: {self.log_tail(2)}")

    def stop(self, timeout_s: float = 15.0) -> int | None:
        status = super().stop(timeout_s)
        self._limits.close()
        return status
