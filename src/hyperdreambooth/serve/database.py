"""SQLite or PostgreSQL, with one writer at a time.

A transaction that writes has the whole database, and with it the folder of files, for itself: SQLite's own
lock, an advisory lock of PostgreSQL. So both behave alike, and every rule of the queue can be read as if
there were no other process. Transactions take milliseconds; what takes longer happens outside of them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from hyperdreambooth.files import InputError, first_line

MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x4D42  # any number that no other program on the database uses


class Database:
    """The connections to a database; `read` and `write` give a session in a transaction."""

    def __init__(self, url: str) -> None:
        try:
            self._sqlite = make_url(url).get_backend_name() == "sqlite"
            options: dict[str, Any] = {"connect_args": {"timeout": 60}} if self._sqlite else {}
            self._engine = create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=40, **options)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise InputError(
                f"database: {first_line(error)}; expected sqlite:///FILE or postgresql+psycopg://HOST/NAME "
                "(pip install 'hyperdreambooth[postgres]')"
            ) from None
        if self._sqlite:
            event.listen(self._engine, "connect", _set_up)
            event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(writes=True)

    @contextmanager
    def read(self) -> Generator[Session]:
        """Gives a session that sees one state of the database."""
        with Session(self._engine) as session:
            yield session

    @contextmanager
    def write(self) -> Generator[Session]:
        """Gives a session that has the database for itself; it is committed unless the block raises."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            if not self._sqlite:
                session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            yield session

    def migrate(self) -> None:
        """Brings the tables to the version of this program (Alembic).

        Raises:
            InputError: the database cannot be reached.
        """
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        try:
            with self.write() as session:
                config.attributes["connection"] = session.connection()
                command.upgrade(config, "head")
        except OperationalError as error:
            raise InputError(f"database: cannot be opened ({first_line(error)}); check its URL") from None

    def scrub(self) -> None:
        """Empties SQLite's write-ahead log, in which deleted rows stand; `secure_delete` clears the rest."""
        if self._sqlite:
            with self._engine.connect() as connection:
                raw: Any = connection.connection.dbapi_connection
                connection.rollback()
                raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()


def _set_up(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transaction of its own
    for setting in (
        "busy_timeout=60000", "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY",
    ):  # fmt: skip
        connection.execute(f"PRAGMA {setting}")


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
