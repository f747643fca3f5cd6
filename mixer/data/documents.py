"""The documents files: per source domain, which source record each document came from.

One row a document, row number = document number: `file` int32 (into the manifest's `sources` of the
domain), `record` int64 (line, row or record number in that file), `tokens` int64 (with its EOS).
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from mixer.core.errors import DataError
from mixer.data.manifest import FileInfo
from mixer.data.shards import READ_ERRORS, local_path, put

SCHEMA = pa.schema(
    [("file", pa.int32()), ("record", pa.int64()), ("tokens", pa.int64())],
    metadata={b"mixer.documents": b"1"},
)


def write(
    filesystem: pafs.FileSystem,
    root: str,
    path: str,
    *,
    file: np.ndarray,
    record: np.ndarray,
    tokens: np.ndarray,
) -> FileInfo:
    """Write a domain's documents file, whole or not at all."""
    arrays = [
        pa.array(np.asarray(file, np.int32)),
        pa.array(np.asarray(record, np.int64)),
        pa.array(np.asarray(tokens, np.int64)),
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
    content = sink.getvalue()
    put(filesystem, root, path, content)
    return FileInfo(path=path, bytes=content.size, sha256=hashlib.sha256(content).hexdigest())


def read(filesystem: pafs.FileSystem, root: str, info: FileInfo) -> pa.Table:
    """All documents of a domain; on local disk a view of a memory map."""
    where = f"{root}/{info.path}"
    local = local_path(filesystem, where)
    try:
        source = filesystem.open_input_file(where) if local is None else pa.memory_map(str(local))
        with source:
            size = source.size()
            if size != info.bytes:
                raise DataError(
                    f"documents file {where} has {size} bytes; the manifest says {info.bytes}. "
                    "It was cut or replaced: restore it, or prepare the domain again."
                )
            reader = pa.ipc.open_file(source)
            if not reader.schema.equals(SCHEMA, check_metadata=True):
                raise DataError(
                    f"documents file {where} has the schema [{_flat(reader.schema)}]; needed [{_flat(SCHEMA)}]. "
                    "It was damaged or replaced: restore it, or prepare the domain again."
                )
            return reader.read_all()
    except READ_ERRORS as error:
        raise DataError(
            f"documents file {where} cannot be read: {error}. Restore it, or prepare the domain again."
        ) from error


def _flat(schema: pa.Schema) -> str:
    return ", ".join(f"{item.name}: {item.type}" for item in schema)
