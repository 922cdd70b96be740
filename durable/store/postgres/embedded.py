"""A private Postgres on a folder of its own: made at the first start, found again by every later one.

    data/            mode 700; remove it and everything is gone
      cluster/       Postgres' own data directory
      socket/        where clients connect; in the temporary folder if the path would be too long for a socket
      server.log     what the server says
      lock, users    one starts or stops at a time; who uses the server now

Only its owner can reach it: it listens on a Unix socket in a folder of mode 700 and on no network address, so there is no
password. Several processes may use one folder; the server is the same for all, and the last to leave stops it. A process
that is killed leaves the server running, and the next to start finds it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from durable.core.errors import StoreError
from durable.store.postgres.binaries import Account, Binaries, account, find_binaries, reachable

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

NAME = "durable"
"""Of the user and of the database."""
PORT = 5432
"""Only a part of the socket's name."""
LONGEST_SOCKET = 103
"""Bytes in a socket's path: macOS has one byte less than this and its end, Linux four more."""
ELSEWHERE = "durable-pg-"
LONGEST_LOG = 10_000_000
"""Bytes; a longer log is put aside at the next start, once."""
LINUX = sys.platform.startswith("linux")
LOOK_EVERY = 0.02
SAY_EVERY = 5.0
DYING_S = 5.0
ORPHANS_S = 60.0
"""A killed server's children may live a little longer, and Postgres will not start beside them."""
FAST_S = 60.0
"""A fast stop that takes longer becomes an immediate one: the next start recovers, nothing is lost."""
KILL_S = 60.0

logger = logging.getLogger("durable.postgres")


class EmbeddedPostgres:
    """A server on the folder `data`, which is made if it is not there.

    `settings`: more of Postgres' own, for when this object is the one that starts the server: {"work_mem": "8MB"}.
    """

    def __init__(self, data: Path | str, *, settings: Mapping[str, str] | None = None) -> None:
        self.data = Path(data).absolute()
        self._cluster = self.data / "cluster"
        self._log = self.data / "server.log"
        self._settings = dict(settings or {})
        self._using: int | None = None

    # ------------------------------------------------------------------ life

    def start(self) -> str:
        """Start the server, or find it running; its URL, for psycopg and psql alike. Made, the first time: about a second.

        Waits as long as the server says that it is starting, since recovery after a crash may take minutes. Raises
        StoreError: no Postgres found, data of another version, or why the server does not start.
        """
        if fcntl is None:
            raise StoreError("An embedded Postgres needs Linux or macOS. Give the URL of a server: postgresql://...")
        self._make_folder()
        with self._alone():
            self._use()
            try:
                running = self.pid
                if running is None or not self._until_ready(running):
                    self._launch()
                return self.url
            except BaseException:
                self._leave()
                raise

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Leave the server, and stop it if nobody else uses it; also one that a killed process left behind.

        `fast` ends connections and writes everything out; `immediate` is a crash, from which the next start recovers.
        """
        if fcntl is None or not self.data.is_dir():
            return
        with self._alone():
            self._leave()
            if self._in_use():
                return
            self._halt(mode)

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Of the server's first process; None if none runs on the folder."""
        pid = self._recorded()
        return pid if pid is not None and _is_server(pid, self._cluster) is not False else None

    @property
    def url(self) -> str:
        """`postgresql://…`; the same after every start. Raises StoreError if no server runs on the folder."""
        if self._recorded() is None:
            raise StoreError(f"No Postgres runs on {self.data}. start() starts one.")
        # As a parameter, not as the host, since drivers disagree on how a path is written there.
        return f"postgresql://{NAME}@/{NAME}?host={quote(str(self._socket_in_use()), safe='/')}&port={PORT}"

    # ------------------------------------------------------------------ starting

    def _make_folder(self) -> None:
        try:
            self.data.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            if not self.data.is_dir():
                raise StoreError(f"{self.data} is not a folder.") from None
        except OSError as error:
            raise StoreError(f"The folder {self.data} cannot be made: {error}.") from error
        known = {"cluster", "cluster.new", "lock"}
        with suppress(PermissionError):
            there = set(os.listdir(self.data))
            if there and not there & known:
                raise StoreError(f"{self.data} holds something else. Give an embedded Postgres a folder of its own.")

    def _launch(self) -> None:
        owner = self.data.stat()
        runs_as = account(owner.st_uid, owner.st_gid)
        major = self._major()
        found = find_binaries(major)
        folder = reachable(found, runs_as)
        if major is None:
            self._initialise(folder, found, runs_as)
        place = self._socket(runs_as.owner)
        if self._log.exists() and self._log.stat().st_size > LONGEST_LOG:
            self._log.replace(self._log.with_suffix(".log.1"))
        self._log.touch(mode=0o600)
        self._hand_over(runs_as, self._cluster, place)
        self._drop_stale_pid(place)
        deadline = time.monotonic() + ORPHANS_S
        while True:
            try:
                self._launch_once(folder, runs_as, place)
                return
            except _Orphans as error:
                if time.monotonic() > deadline:
                    raise StoreError(str(error)) from None
                time.sleep(0.2)

    def _launch_once(self, folder: Path, runs_as: Account, place: Path) -> None:
        settings = {"listen_addresses": "", "unix_socket_directories": str(place), **self._settings}
        arguments = ["-D", str(self._cluster), "-p", str(PORT)]
        for name, value in settings.items():
            arguments += ["-c", f"{name}={value}"]
        before = self._log.stat().st_size
        # The shell goes at once, so the server is nobody's child: it outlives us, and leaves us no zombie.
        command = shlex.join(runs_as.command(folder / "postgres", *arguments))
        with open(self._log, "ab") as log:
            done = subprocess.run(
                ["/bin/sh", "-c", f"{command} </dev/null 1>&2 & echo $!"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for us, not for the server
                check=True,
                **runs_as.options(),
            )
        pid = int(done.stdout)
        try:
            if self._until_ready(pid):
                return
        except BaseException:
            with suppress(OSError):
                os.kill(pid, signal.SIGINT)
            raise
        with open(self._log, "rb") as log:
            log.seek(before)
            text = log.read().decode(errors="replace")
        words = f"Postgres does not start on {self.data}. Its log, {self._log}, ends:\n{_last_lines(text)}"
        raise _Orphans(words) if "pre-existing shared memory block" in text else StoreError(words)

    def _initialise(self, folder: Path, found: Binaries, runs_as: Account) -> None:
        """Made beside and renamed, so that there is a whole one or none."""
        logger.info("Making a Postgres %d in %s (from %s).", found.major, self.data, found.source)
        making = self.data / "cluster.new"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(mode=0o700)
        self._hand_over(runs_as, making)
        # Order and case by code point, the same on every machine, and in no need of the system's locales.
        locale = ["--locale=C"]
        if found.major >= 17:
            locale += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        # Over a network nobody gets in, even if somebody has it listen on one.
        access = ["--auth-local=trust", "--auth-host=reject"]
        made = ["-D", str(making), "-U", NAME, "-E", "UTF8", "--data-checksums"]
        self._tool(runs_as.command(folder / "initdb", *made, *access, *locale), runs_as)
        self._tool(
            runs_as.command(folder / "postgres", "--single", "-D", str(making), "-c", "exit_on_error=on", "template1"),
            runs_as,
            f"CREATE DATABASE {NAME}\n",
        )
        making.rename(self._cluster)
        _sync(self.data)

    def _tool(self, command: list[str], runs_as: Account, text: str = "") -> None:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, **runs_as.options())
        if done.returncode != 0:
            raise StoreError(
                f"A Postgres cannot be made in {self.data}:\n{_last_lines(done.stdout + done.stderr)}"
                + (
                    f"\nIt runs as user {runs_as.user} here, who must be able to pass through the folders above."
                    if runs_as.user is not None
                    else ""
                )
            )

    def _until_ready(self, pid: int) -> bool:
        """Wait while it lives; False if it ends before it answers: it could not start, or was killed a moment ago."""
        began = said = time.monotonic()
        while True:
            lines = self._pid_file()
            if len(lines) > 7 and lines[0].strip() == str(pid) and lines[7].strip() == "ready" and self._answers(pid):
                return True
            if not _lives(pid):
                return False
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                logger.info("Postgres on %s is starting up; %.0f s so far.", self.data, said - began)
            time.sleep(LOOK_EVERY)

    def _answers(self, pid: int) -> bool:
        """A ready server answers the question whether it speaks TLS, whatever else it would refuse."""
        path = self._socket_in_use() / f".s.PGSQL.{PORT}"
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(SAY_EVERY)
                connection.connect(str(path))
                connection.sendall(struct.pack("!ii", 8, 80877103))
                return connection.recv(1) != b""
        except FileNotFoundError:
            if not _lives(pid):
                return False
            raise StoreError(
                f"Postgres runs on {self.data} (pid {pid}), and its socket {path} is gone; was the folder moved meanwhile? "
                f"End that process (kill -INT {pid}) and start again."
            ) from None
        except OSError:
            return False

    def _major(self) -> int | None:
        try:
            return int((self._cluster / "PG_VERSION").read_text())
        except FileNotFoundError:
            return None
        except PermissionError:
            raise StoreError(f"{self._cluster} is another user's. Run as that user, or give another folder.") from None

    def _socket(self, owner: int) -> Path:
        """A folder short enough for a socket in it, and closed to others."""
        folder = self.data / "socket"
        if _fits(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            return folder
        digest = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:12]
        bases = [Path(tempfile.gettempdir()), Path("/tmp")]
        base = next((base for base in bases if _fits(base / f"{ELSEWHERE}{digest}-12345678")), bases[-1])
        folder = base / f"{ELSEWHERE}{digest}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if not _is_private(folder, {owner, os.geteuid()}):
            folder = Path(tempfile.mkdtemp(prefix=folder.name + "-", dir=base))
        return folder

    def _hand_over(self, runs_as: Account, *paths: Path) -> None:
        """What root made to whom the server runs as. A folder last, as the sign that all in it is."""
        if os.geteuid() != 0:
            return
        for top in (self.data, *paths):
            if top.lstat().st_uid == runs_as.owner:
                continue
            inside = [] if top == self.data else [*top.rglob("*")]
            for path in (*inside, top):
                os.lchown(path, runs_as.owner, runs_as.group)

    # ------------------------------------------------------------------ stopping

    def _halt(self, mode: Literal["fast", "immediate"]) -> None:
        pid = self.pid
        used = self._socket_in_use()
        if pid is not None:
            self._end(pid, mode)
        if used.parent != self.data and used.name.startswith(ELSEWHERE):
            shutil.rmtree(used, ignore_errors=True)

    def _end(self, pid: int, mode: Literal["fast", "immediate"]) -> None:
        steps = [(signal.SIGINT, FAST_S)] if mode == "fast" else []
        for number, patience in [*steps, (signal.SIGQUIT, KILL_S)]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return
            except PermissionError:
                raise StoreError(
                    f"Postgres on {self.data} (pid {pid}) is another user's; it cannot be stopped."
                ) from None
            deadline = time.monotonic() + patience
            while _lives(pid):
                if time.monotonic() > deadline:
                    logger.warning("Postgres on %s does not stop; pid %d.", self.data, pid)
                    break
                time.sleep(LOOK_EVERY)
            else:
                return
        raise StoreError(f"Postgres on {self.data} (pid {pid}) does not stop. See {self._log}.")

    # ------------------------------------------------------------------ what is there

    def _pid_file(self) -> list[str]:
        """Pid, data directory, start time, port, folder of the socket, address, memory, state."""
        try:
            return (self._cluster / "postmaster.pid").read_text().splitlines()
        except OSError:
            return []

    def _recorded(self) -> int | None:
        """The pid of the server that runs, or of one that was killed."""
        lines = self._pid_file()
        return int(lines[0]) if lines and lines[0].strip().isdigit() else None

    def _socket_in_use(self) -> Path:
        lines = self._pid_file()
        return Path((lines[4].strip() if len(lines) > 4 else "") or self.data / "socket")

    def _drop_stale_pid(self, place: Path) -> None:
        """Postgres takes whatever process has a dead server's pid for that server, be it a zombie. We look more closely, and
        nobody else starts one here meanwhile. Where we cannot tell, or the pid is free, the files are left to Postgres; its
        look at the shared memory stands in any case."""
        pid = self._recorded()
        deadline = time.monotonic() + DYING_S
        while pid is not None and _lives(pid) and _command(pid) == "" and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)  # killed a moment ago
        if pid is None or not _exists(pid):
            return
        if _is_server(pid, self._cluster) is False:
            logger.info("The pid %d in postmaster.pid is not this server's any more; the file is removed.", pid)
            for file in (self._cluster / "postmaster.pid", place / f".s.PGSQL.{PORT}.lock"):
                file.unlink(missing_ok=True)

    # ------------------------------------------------------------------ who uses it

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time, of all threads and processes, starts or stops."""
        file = self._open("lock")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Another process starts or stops Postgres on %s; waiting for it.", self.data)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _use(self) -> None:
        if self._using is None:
            self._using = self._open("users")
            fcntl.flock(self._using, fcntl.LOCK_SH)

    def _leave(self) -> None:
        using, self._using = self._using, None
        if using is not None:
            os.close(using)

    def _in_use(self) -> bool:
        file = self._open("users")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def _open(self, name: str) -> int:
        try:
            return os.open(self.data / name, os.O_RDWR | os.O_CREAT, 0o600)
        except PermissionError:
            raise StoreError(f"{self.data} is another user's. Run as that user, or give another folder.") from None


class _Orphans(StoreError):
    """Children of a killed server still hold its memory."""


def _fits(folder: Path) -> bool:
    path = os.fsencode(folder / f".s.PGSQL.{PORT}")
    return len(path) <= LONGEST_SOCKET and not re.search(rb"[,\"\s]", path)  # a list of folders is split at these


def _is_private(folder: Path, owners: set[int]) -> bool:
    state = folder.lstat()
    return stat.S_ISDIR(state.st_mode) and state.st_uid in owners and not state.st_mode & 0o077


def _is_server(pid: int, cluster: Path) -> bool | None:
    """Whether this process is the server of this data directory; None if that cannot be seen."""
    if not _lives(pid):
        return False
    if LINUX:
        with suppress(OSError):  # it stays in its data directory, wherever that is moved
            return os.path.samefile(f"/proc/{pid}/cwd", cluster)
    words = _command(pid)
    if words is None or f"-D {cluster}" in words:
        return None if words is None else True
    return None if "postgres" in words else False


def _command(pid: int) -> str | None:
    """The command line; None if it is hidden from us."""
    if not LINUX:
        return _ps(pid, "command")
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return None


def _exists(pid: int) -> bool:
    """Zombies too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _lives(pid: int) -> bool:
    if not _exists(pid):
        return False
    if not LINUX:
        return not _ps(pid, "stat").startswith("Z")
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return _exists(pid)  # gone this moment, or hidden
    return state not in ("Z", "X")


def _ps(pid: int, what: str) -> str:
    done = subprocess.run(["ps", "-ww", "-o", f"{what}=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout


def _last_lines(text: str, count: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-count:]) or "(nothing)"


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
