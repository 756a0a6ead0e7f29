"""The tables and functions of topics and queues: installed and upgraded by numbered `.sql` files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

from psycopg2 import errors as sqlstates

from dbgate.errors import DatabaseError, SchemaMissing
from dbgate.gateway import Gateway

REMEDY = "run `dbgate migrate`, or await dbgate.messaging.migrate(gate)"

_LOCK = 0x6462_6761_7465  # "dbgate"; any number that nobody else takes


@dataclass(frozen=True, slots=True)
class Migration:
    """One step: the files in `sql/` are `NNNN_name.sql`."""

    version: int
    name: str
    sql: str


@cache
def migrations() -> tuple[Migration, ...]:
    """All steps, in order."""
    found = []
    for file in resources.files(__package__).joinpath("sql").iterdir():
        number, _, name = file.name.removesuffix(".sql").partition("_")
        found.append(Migration(int(number), name, file.read_text("utf-8")))
    return tuple(sorted(found, key=lambda migration: migration.version))


async def migrate(gate: Gateway) -> list[Migration]:
    """Bring the database's `dbgate` schema up to this version of dbgate, in one transaction.

    Safe to run from many processes at once: the first does the work, the others wait for it.

    Returns:
        the steps that this call applied.
    """
    async with gate.transaction(isolation="read committed") as tx:
        await tx.execute("select pg_advisory_xact_lock(%s)", [_LOCK])
        await tx.execute("""
            create schema if not exists dbgate;
            create table if not exists dbgate.migration (
                version    integer primary key,
                name       text not null,
                applied_at timestamptz not null default clock_timestamp()
            )
        """)
        present = {row.version for row in await tx.fetch("select version from dbgate.migration")}
        missing = [step for step in migrations() if step.version not in present]
        for step in missing:
            await tx.execute(step.sql)
            await tx.execute(
                "insert into dbgate.migration (version, name) values (%s, %s)",
                [step.version, step.name],
            )
    return missing


async def epoch_of(gate: Gateway) -> int:
    """The epoch of this database's messages, once it is sure that the schema is as needed.

    Raises:
        SchemaMissing: it is not there, or of an older version.
    """
    needed = migrations()[-1].version
    try:
        present = await gate.fetch_value("select max(version) from dbgate.migration")
        if present is None or present < needed:
            raise SchemaMissing(
                f"the dbgate schema has version {present or 0}, this dbgate needs {needed}: {REMEDY}"
            )
        epoch: int = await gate.fetch_value("select dbgate.epoch()")
    except (sqlstates.InvalidSchemaName, sqlstates.UndefinedTable) as error:
        raise missing(error) from None
    return epoch


def missing(error: Exception) -> SchemaMissing:
    """The error that says how to install what was not found."""
    database = f" ({error.diag.message_primary})" if isinstance(error, DatabaseError) else ""
    return SchemaMissing(f"this database has no topics yet{database}: {REMEDY}")
