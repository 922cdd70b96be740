#!/usr/bin/env python3
"""Everything a developer runs, from a clean clone, with nothing but Python 3.11 or later.

    python3 dev.py demo             an order, a crash and a recovery, to look at
    python3 dev.py test             every suite, with minutes per suite
    python3 dev.py test PATH ...    only that, with pytest's own arguments
    python3 dev.py check            lint, format, types, house rules
    python3 dev.py bench NAME       one benchmark
    python3 dev.py chaos            random faults on real engines and a real Postgres, for as long as you like
    python3 dev.py lock             write requirements.lock anew

Each command explains itself with --help. The first run makes `.venv`; later runs install only when pyproject.toml or
requirements.lock has changed. Set DURABLE_PYTHON to an interpreter that has everything, and nothing is made or installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "dev-stamp"
LOCK = ROOT / "requirements.lock"
OLDEST = (3, 11)

SIMULATION_SECONDS = 90
CHAOS_SECONDS = 55
BENCH_SECONDS = 10
"""What `test` spends on suites that could go on for ever; `test --all` sets no bound."""


class Failure(Exception):
    """Says in a sentence what is wrong and what to do about it."""


# -- the commands


def demo(args: list[str]) -> int:
    """demo [ARGS ...]

    Run examples/order_demo.py on an embedded database. Arguments go to the demo.
    """
    return call([environment("run"), "examples/order_demo.py", *args])


def test(args: list[str]) -> int:
    """test [--all] [PATH or pytest arguments ...]

    Without arguments: all suites in order; simulation, chaos and benchmarks within a budget that starts elsewhere at each
    commit, and of what runs in several settings (the engine hot and cold, stores, brokers) those whose turn it is.
    --all: the same without a budget. Anything else goes to one pytest run: `test tests/core -k replay`.
    Tests of services that are not at hand are skipped with their remedy; with DURABLE_TEST_REQUIRE=all they fail.
    """
    everything = "--all" in args
    args = [arg for arg in args if arg != "--all"]
    pytest = [environment("test"), "-m", "pytest", "-rs"]
    if args:
        return call([*pytest, *args])

    def within(seconds: int) -> list[str]:
        return [] if everything else ["--budget", str(seconds)]

    two = ["-n", "2"] if (os.cpu_count() or 1) > 1 else []
    rotate = [] if everything else ["--rotate"]
    unmarked = ["-m", "not simulation and not chaos and not broker and not http and not bench"]
    outside = ["--ignore=tests/examples", "--ignore=tests/cli"]
    suites = [
        ("unit, conformance", [*pytest, "tests", *unmarked, *two, *outside, *rotate]),
        (
            "transports, workers",
            [*pytest, "tests", "-m", "broker", *rotate, *two, *(["--dist", "loadfile"] if two else [])],
        ),
        ("service", [*pytest, "tests", "-m", "http", *rotate, *two, *(["--dist", "loadfile"] if two else [])]),
        ("simulation", [*pytest, "tests", "-m", "simulation", *within(SIMULATION_SECONDS)]),
        ("chaos", [*pytest, "tests", "-m", "chaos", *within(CHAOS_SECONDS)]),
        ("bench", [*pytest, "tests", "-m", "bench", *within(BENCH_SECONDS)]),
    ]
    for name in ("examples", "cli"):
        suites.append((name, [*pytest, f"tests/{name}", *unmarked, *two]))
    return report([(name, command) for name, command in suites if has_tests(name)])


def check(args: list[str]) -> int:
    """check [--fix]

    Lint (ruff), format (ruff), types (mypy --strict) and house rules (tests/house). --fix mends what ruff can mend.
    """
    python = environment("test")
    if "--fix" in args:
        call([python, "-m", "ruff", "check", "--fix", "."])
        call([python, "-m", "ruff", "format", "."])
    return report(
        [
            ("lint", [python, "-m", "ruff", "check", "."]),
            ("format", [python, "-m", "ruff", "format", "--check", "."]),
            ("types", [python, "-m", "mypy"]),
            ("house", [python, "-m", "pytest", "tests/house"]),
        ]
    )


def bench(args: list[str]) -> int:
    """bench NAME [ARGS ...]

    Run tests/bench/NAME.py. Arguments go to the benchmark. Without a name: what there is.
    """
    folder = ROOT / "tests" / "bench"
    names = sorted(path.stem for path in folder.glob("[a-z]*.py") if not path.stem.startswith(("conftest", "test_")))
    if not args or args[0] not in names:
        say("Benchmarks: " + (", ".join(names) or "none yet"))
        return 2
    return call([environment("test"), "-m", f"tests.bench.{args[0]}", *args[1:]])


def chaos(args: list[str]) -> int:
    """chaos [--minutes N] [--seed N]

    Three engines and their callers on a Postgres of their own, with one random fault after another for N minutes
    (default 5); then everything heals and the verdict is read. Tells faults by kind, runs, and what was violated; a failure
    prints the moves made, and its seed draws them again.
    """
    return call([environment("test"), "-m", "tests.chaos.nemesis", *args])


def lock(args: list[str]) -> int:
    """lock

    Resolve pyproject.toml for every platform and Python it supports, into requirements.lock, with hashes. Uses uv, from
    a temporary place if it is not installed. Arguments go to `uv pip compile`, for instance --upgrade.
    """
    with tempfile.TemporaryDirectory() as temporary:
        uv: str | None = shutil.which("uv")
        if not uv:
            subprocess.run([sys.executable, "-m", "venv", temporary], check=True)
            subprocess.run([str(bin_of(Path(temporary)) / "pip"), "install", "-q", "uv"], check=True)
            uv = str(bin_of(Path(temporary)) / "uv")
        command = [uv, "pip", "compile", "pyproject.toml", "--extra", "test", "--universal", "--python-version", "3.11"]
        command += ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-index-url", "--quiet"]
        code = call([*command, "--output-file", LOCK.name, *args])
    if code == 0:
        pins = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
        LOCK.write_text("\n".join([f"# {wanted_by_lock()}", *pins, ""]))
    return code


COMMANDS = {"demo": demo, "test": test, "check": check, "bench": bench, "chaos": chaos, "lock": lock}


# -- the environment


def environment(level: str) -> str:
    """The interpreter to run with. `level` "run" has the product, "test" also what its tests need."""
    given = os.environ.get("DURABLE_PYTHON")
    if given:
        return given
    python = bin_of(VENV) / ("python.exe" if os.name == "nt" else "python")
    digest = digest_of(ROOT / "pyproject.toml", LOCK)
    stamp = STAMP.read_text().split() if STAMP.exists() else []
    if works(python) and stamp[:1] == [digest] and level in stamp[1:]:
        return str(python)
    if not works(python):
        make_venv()
    started = time.monotonic()
    say("Installing into .venv; this happens when pyproject.toml or the lock has changed ...")
    install(str(python), level)
    STAMP.write_text(digest + (" run test" if level == "test" else " run"))
    say(f"Installed in {time.monotonic() - started:.0f} s.")
    return str(python)


def make_venv() -> None:
    shutil.rmtree(VENV, ignore_errors=True)
    uv = shutil.which("uv")
    if uv and run_quietly([uv, "venv", "--quiet", "--python", sys.executable, str(VENV)]):
        return
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise Failure(
            f"This Python ({sys.executable}) cannot make a virtual environment: its venv or ensurepip module is missing. "
            f"On Debian and Ubuntu: apt install python3-venv. Or install uv, which needs neither."
        ) from None
    if not run_quietly([sys.executable, "-m", "venv", str(VENV)]):
        raise Failure(f"`{sys.executable} -m venv .venv` failed; its output is above.")


def install(python: str, level: str) -> None:
    uv = shutil.which("uv")
    ways = [[uv, "pip", "install", "--quiet", "--python", python]] if uv else []
    if not run_quietly([python, "-c", "import pip"], silent=True):
        run_quietly([python, "-m", "ensurepip"], silent=True)  # a .venv that uv made has none
    if run_quietly([python, "-c", "import pip"], silent=True):
        ways.append([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
    for way in ways:
        if level == "test" and lock_fits():
            if run_quietly([*way, "-r", str(LOCK)]) and run_quietly([*way, "--no-deps", "-e", "."]):
                return
            say("requirements.lock could not be installed here; resolving anew instead.")
        if run_quietly([*way, "-e", ".[test]" if level == "test" else "."]):
            return
    raise Failure(
        "Installing failed; the installer's own words are above. The first run needs a package index: without a network, "
        "or behind a proxy, point pip or uv at one you can reach (PIP_INDEX_URL, UV_INDEX_URL), or set DURABLE_PYTHON to an "
        "interpreter that has everything installed."
    )


def lock_fits() -> bool:
    """Whether the lock was made for what pyproject.toml asks for today."""
    return LOCK.exists() and LOCK.read_text().startswith(f"# {wanted_by_lock()}\n")


def wanted_by_lock() -> str:
    """A digest of what is asked for, and nothing else: a new version number of ours makes no lock stale."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"] + [project["requires-python"]]
    return hashlib.sha256("\n".join(wanted).encode()).hexdigest()


def bin_of(venv: Path) -> Path:
    return venv / ("Scripts" if os.name == "nt" else "bin")


def works(python: Path) -> bool:
    if not python.exists():
        return False
    return run_quietly([str(python), "-c", f"import sys; sys.exit(sys.version_info < {OLDEST})"], silent=True)


def digest_of(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files if file.exists())).hexdigest()


# -- running and telling


def report(steps: list[tuple[str, list[str]]]) -> int:
    """Run every step, whatever became of the ones before; tell the minutes of each. 0 only if none failed."""
    lines, failed = [], False
    for name, command in steps:
        say(f"== {name}")
        started = time.monotonic()
        code = call(command)
        minutes = (time.monotonic() - started) / 60
        failed = failed or code != 0
        lines.append(f"{name:<20} {minutes:6.2f} min   {'ok' if code == 0 else f'FAILED ({code})'}")
    say("\n".join(["", *lines, ""]))
    return 1 if failed else 0


def has_tests(suite: str) -> bool:
    """A suite whose folder has no test file yet is left out. One that has files and collects nothing fails: a lost mark."""
    folder = "server" if suite == "service" else suite
    return "," in suite or any((ROOT / "tests" / folder).glob("**/test_*.py"))


def call(command: list[str]) -> int:
    sys.stdout.flush()
    return subprocess.run(command, cwd=ROOT).returncode


def run_quietly(command: list[str], *, silent: bool = False) -> bool:
    """Whether it succeeded; what it said is shown only if it did not."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode and not silent:
        say(done.stdout.strip())
    return done.returncode == 0


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str]) -> int:
    if sys.version_info < OLDEST:
        newer = [name for name in ("python3.14", "python3.13", "python3.12", "python3.11") if shutil.which(name)]
        say(
            f"Durable needs Python 3.11 or later; this is {sys.version.split()[0]}. "
            + (f"Try: {newer[0]} dev.py {' '.join(argv)}" if newer else "Install a newer one, or uv, and try again.")
        )
        return 1
    if not argv or argv[0] in ("-h", "--help", "help"):
        say((__doc__ or "").strip())
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        say(f"There is no command {argv[0]!r}. Commands: {', '.join(COMMANDS)}.")
        return 2
    if argv[1:2] in (["-h"], ["--help"]):
        say("python3 dev.py " + "\n".join(line.strip() for line in (command.__doc__ or "").strip().splitlines()))
        return 0
    try:
        return command(argv[1:])
    except Failure as failure:
        say(str(failure))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
