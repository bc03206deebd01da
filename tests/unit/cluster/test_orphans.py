"""In a process of its own, which inherits as PID 1 does."""

import subprocess
import sys

PROGRAM = """
import ctypes, os, subprocess, sys, time
import psutil
from revivemoe.cluster.orphans import Orphans

PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
inherited = subprocess.run(["sh", "-c", "sleep 0.2 & echo $!"], stdout=subprocess.PIPE, check=True)
ours = subprocess.Popen(["sleep", "60"])
deadline = time.monotonic() + 10
pid = int(inherited.stdout)
while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
    assert time.monotonic() < deadline
    time.sleep(0.01)
orphans = Orphans()
orphans.look()
assert psutil.pid_exists(pid), "whoever waits for it comes first"
orphans.look()
assert not psutil.pid_exists(pid)
assert ours.poll() is None
ours.kill()
ours.wait()
"""


def test_what_ended_and_nobody_waits_for_is_reaped() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
