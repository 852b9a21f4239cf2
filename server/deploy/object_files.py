"""An object store for the SuperLink that puts large parts of messages into files instead of its database.

Flower 1.41 writes every part of a message, up to 5 MB each, into the SQLite database that also holds its
tasks, sites and heartbeats, and SQLite lets only one connection write at a time. With models of 200 MB and
more, the others wait longer than Flower's limit of five seconds, and sites, runs and the executor get HTTP
500 ("database is locked"). Here the row of a large part holds the name of a file instead.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from flwr.supercore.constant import SQLITE_PRAGMAS
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import StoredObject
from sqlalchemy import event, func, select, update

SMALL_BYTES = 2**16
"""Objects up to this size stay in the database."""
IN_FILE = b"file:"
"""Marks a row that holds a file's name; an object itself always begins with the name of its type."""
MOST_BYTES_OF_A_NAME = 64
BUSY_MILLISECONDS = 60_000
"""How long a database connection waits for another one to finish writing."""


class FileObjectStore(SqlObjectStore):
    """Flower's database store, with large objects as files in the folder `objects` beside the database.

    A file is written before its row and removed after the row's deletion is committed. If a file is lost all
    the same, as in a power failure, the object counts as missing and its message is sent again.
    """

    def __init__(self, database_path: str, verify: bool = True) -> None:
        super().__init__(database_path, verify)
        self._folder = Path(database_path).with_name("objects")

    def initialize(self, log_queries: bool = False, **engine_kwargs: Any) -> list[str]:
        """Create Flower's tables, and remove files that a killed server left behind; returns table names."""
        tables = super().initialize(log_queries, **engine_kwargs)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with self.session() as session:
            short = select(StoredObject.content).where(
                func.length(StoredObject.content) <= MOST_BYTES_OF_A_NAME
            )
            known = {self._file(content) for content in session.scalars(short)}
        for path in set(self._folder.iterdir()) - known:
            path.unlink()
        return tables

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store the content of a preregistered object; an object that is stored already is left unchanged.

        Raises:
            ValueError: the content doesn't have the id's hash.
            NoObjectInStoreError: the object wasn't preregistered.
            OSError: the file can't be written.
        """
        if len(object_content) <= SMALL_BYTES:
            super().put(object_id, object_content)
            return
        if self.verify:
            if object_id != get_object_id(object_content):
                raise ValueError(f"Object ID {object_id} does not match content hash")
            validate_object_content(content=object_content)
        name, is_new = uuid.uuid4().hex, False
        path = self._folder / name
        try:
            path.write_bytes(object_content)
            is_new = self._record(object_id, IN_FILE + name.encode())
        finally:
            if not is_new:
                path.unlink(missing_ok=True)
        if not is_new and object_id not in self:
            raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")

    def _record(self, object_id: str, content: bytes) -> bool:
        """Set a missing object's row to `content`; False if it isn't preregistered or isn't missing."""
        missing = StoredObject.object_id == object_id, StoredObject.is_available == 0
        change = update(StoredObject).where(*missing).values(content=content, is_available=1)
        with self.session() as session:
            return session.scalar(change.returning(StoredObject.object_id)) is not None

    def get(self, object_id: str) -> bytes | None:
        """The object's content; b"" if it hasn't arrived yet, None if it is unknown or its file is lost."""
        content = super().get(object_id)
        path = self._file(content)
        if path is None:
            return content
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def delete(self, object_id: str) -> None:
        """Delete an object without references, and its children; files are removed once that is committed."""
        with self._mutation_session() as session:
            unused = StoredObject.object_id == object_id, StoredObject.ref_count == 0
            path = self._file(session.scalar(select(StoredObject.content).where(*unused)))
            super().delete(object_id)
            if path is not None:
                gone = path
                event.listen(session, "after_commit", lambda _: gone.unlink(missing_ok=True), once=True)

    def clear(self) -> None:
        """Delete all objects and their files."""
        super().clear()
        for path in self._folder.iterdir():
            path.unlink()

    def _file(self, content: bytes | None) -> Path | None:
        """The path of the file that a row's content names; None if the content is the object itself."""
        if content is None or not content.startswith(IN_FILE):
            return None
        return self._folder / content.removeprefix(IN_FILE).decode("ascii")


def keep_objects_in_files() -> None:
    """Make this process's SuperLink use `FileObjectStore`, and wait up to a minute for a locked database."""
    from flwr.supercore import sql_mixin
    from flwr.supercore.object_store import object_store_factory

    vars(object_store_factory)["SqlObjectStore"] = FileObjectStore
    pragmas = dict(SQLITE_PRAGMAS) | {"busy_timeout": str(BUSY_MILLISECONDS)}
    vars(sql_mixin)["SQLITE_PRAGMAS"] = tuple(pragmas.items())
