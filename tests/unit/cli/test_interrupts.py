"""Ctrl-C and SIGTERM where something has to be cleaned up."""

import asyncio
import signal
import subprocess
import sys

import pytest

from revivemoe.cli.interrupts import cleaned_up
from revivemoe.cli.serve_run import _stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_raises_once_so_that_cleaning_up_is_not_broken(number: signal.Signals) -> None:
    done = []

    def work() -> None:
        with cleaned_up():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                done.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["cleaned up"]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_two_signals_at_once_are_two() -> None:
    """The second may come before the loop has done what the first asked for."""

    async def main() -> None:
        stop, cut = asyncio.Event(), asyncio.Event()
        with _stop_on_signals(stop, cut):
            signal.raise_signal(signal.SIGTERM)
            assert not stop.is_set()
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(0)
            assert stop.is_set()
            assert cut.is_set()

    asyncio.run(main())


IN_SIM = """
import signal, sys
from revivemoe.cli import sim_run
from revivemoe.cli.main import main

def run_seed(number, **_):
    signal.raise_signal(signal.SIGINT)

sim_run.run_seeds = lambda numbers, on_result: run_seed(0)
sys.argv = ["revivemoe", "sim"]
main()
"""


def test_a_command_that_is_interrupted_ends_with_130_and_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", IN_SIM], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == ""
