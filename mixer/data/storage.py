"""Where files lie: a path or URI to a pyarrow file system, and files stored whole or not at all."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from mixer.core.errors import ConfigError, DataError

READ_ERRORS = (OSError, pa.ArrowException, ValueError, EOFError)  # what reading a damaged file may raise
TEMPORARY_SUFFIX = ".tmp"  # what a killed writer leaves behind ends so; never listed in a manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How an object store is reached. Holds no secret: credentials come from the store's own chain."""

    endpoint: str | None = None  # of an S3-compatible store, as http://10.0.0.7:9000
    region: str | None = None
    anonymous: bool = False

    def locate(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """The file system of a path or URI, and the path in it."""
        if "://" not in uri:
            return pafs.LocalFileSystem(), os.path.abspath(uri)
        parts = urlsplit(uri)
        if parts.password or (parts.username and parts.scheme in ("s3", "gs", "gcs")):
            raise ConfigError(
                f"the {parts.scheme} URI of bucket {parts.hostname!r} holds credentials, which would end up "
                "in logs. Leave them out: the store's usual variables, profiles and roles are used."
            )
        root = f"{parts.netloc}{parts.path}".rstrip("/")
        try:
            if parts.scheme == "s3" and (self.endpoint or self.region or self.anonymous):
                endpoint = urlsplit(self.endpoint or "")
                return pafs.S3FileSystem(
                    endpoint_override=endpoint.netloc or self.endpoint,
                    scheme=endpoint.scheme if endpoint.netloc else "https",
                    region=self.region,
                    anonymous=self.anonymous,
                ), root
            if parts.scheme in ("gs", "gcs") and (self.endpoint or self.anonymous):
                endpoint = urlsplit(self.endpoint or "")
                return pafs.GcsFileSystem(
                    endpoint_override=endpoint.netloc or self.endpoint,
                    scheme=endpoint.scheme if endpoint.netloc else "https",
                    anonymous=self.anonymous,
                ), root
            filesystem, root = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ConfigError(
                f"{uri} cannot be reached: {error}. Give a local path or an s3://, gs:// or file:// URI."
            ) from error
        return filesystem, root.rstrip("/")


def put(filesystem: pafs.FileSystem, root: str, path: str, content: Any) -> None:
    """Store a file's content under root/path, whole or not at all; replaces what was there."""
    local = local_path(filesystem, f"{root}/{path}")
    try:
        if local is None:
            with filesystem.open_output_stream(f"{root}/{path}", compression=None) as stream:
                stream.write(content)
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        temporary = local.with_name(f".{local.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
        try:
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(local)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(local.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise DataError(
            f"cannot write {root}/{path}: {error}. It needs a writable place with {len(content)} bytes free; "
            "nothing half-written was left."
        ) from error


def local_path(filesystem: pafs.FileSystem, path: str) -> Path | None:
    """The path on this machine's disk, or None for an object store."""
    if isinstance(filesystem, pafs.SubTreeFileSystem):
        return local_path(filesystem.base_fs, f"{filesystem.base_path.rstrip('/')}/{path.lstrip('/')}")
    return Path(path) if isinstance(filesystem, pafs.LocalFileSystem) else None


class KeptFile:
    """A remote file as Arrow reads it, with the parts already fetched at hand. Python's file protocol."""

    closed = False

    def __init__(self, file: pa.NativeFile, size: int, kept: Mapping[int, Any]) -> None:
        self._file = file
        self._size = size
        self._kept = kept
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def read(self, num_bytes: int) -> bytes:
        start, stop = self._place, min(self._place + num_bytes, self._size)
        self._place = stop
        for first, part in self._kept.items():
            if first <= start and stop <= first + len(part):
                return bytes(memoryview(part)[start - first : stop - first])
        return self._file.read_at(stop - start, start)

    def close(self) -> None:
        self.closed = True
