"""Where the SuperLink keeps the large parts of messages: in files beside its database, not in it.

Flower 1.41 writes every part of a message, up to 5 MB each, into the SQLite database in which it keeps its
tasks, sites and heartbeats too, and SQLite lets one connection write at a time. With models of 200 MB and
more the others wait for longer than the five seconds that Flower gives them, and sites, runs and the executor
are answered 500 ("database is locked"). Here a row holds the name of a file instead.
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
"""Objects up to here stay in the database."""
IN_FILE = b"file:"
"""Before the name of a file, in the place of an object, which always begins with the name of its kind."""
MOST_BYTES_OF_A_NAME = 64
BUSY_MILLISECONDS = 60_000
"""How long a connection waits for its turn to write."""


class FileObjectStore(SqlObjectStore):
    """Flower's store in a database, whose large objects are files in the folder `objects` beside it.

    A file is written before its row says so and removed after the row is gone for good. One that is lost
    all the same, as when the power fails, is an object that was never there: its message is sent again.
    """

    def __init__(self, database_path: str, verify: bool = True) -> None:
        super().__init__(database_path, verify)
        self._folder = Path(database_path).with_name("objects")

    def initialize(self, log_queries: bool = False, **engine_kwargs: Any) -> list[str]:
        """As Flower's; files that a killed server left behind are removed."""
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
        """Keep an object that was preregistered; one that is there already stays as it is.

        Raises:
            ValueError: it isn't what its id says.
            NoObjectInStoreError: it wasn't preregistered.
            OSError: it can't be written.
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
        """Say where an object is; false where it isn't waited for."""
        missing = StoredObject.object_id == object_id, StoredObject.is_available == 0
        change = update(StoredObject).where(*missing).values(content=content, is_available=1)
        with self.session() as session:
            return session.scalar(change.returning(StoredObject.object_id)) is not None

    def get(self, object_id: str) -> bytes | None:
        """The object; b"" while it is on its way, None where it isn't known or its file is lost."""
        content = super().get(object_id)
        path = self._file(content)
        if path is None:
            return content
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def delete(self, object_id: str) -> None:
        """Delete an object and what it alone refers to; the files when that can't be undone any more."""
        with self._mutation_session() as session:
            unused = StoredObject.object_id == object_id, StoredObject.ref_count == 0
            path = self._file(session.scalar(select(StoredObject.content).where(*unused)))
            super().delete(object_id)
            if path is not None:
                gone = path
                event.listen(session, "after_commit", lambda _: gone.unlink(missing_ok=True), once=True)

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        for path in self._folder.iterdir():
            path.unlink()

    def _file(self, content: bytes | None) -> Path | None:
        """Where an object is whose row holds that, if it is in a file."""
        if content is None or not content.startswith(IN_FILE):
            return None
        return self._folder / content.removeprefix(IN_FILE).decode("ascii")


def keep_objects_in_files() -> None:
    """Let this process's SuperLink use such a store, and wait for its turn instead of giving up."""
    from flwr.supercore import sql_mixin
    from flwr.supercore.object_store import object_store_factory

    vars(object_store_factory)["SqlObjectStore"] = FileObjectStore
    pragmas = dict(SQLITE_PRAGMAS) | {"busy_timeout": str(BUSY_MILLISECONDS)}
    vars(sql_mixin)["SQLITE_PRAGMAS"] = tuple(pragmas.items())
