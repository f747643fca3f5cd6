"""A local S3-compatible server that writes down what was asked of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.fs as pafs
import pytest


@dataclass
class S3:
    """The server's file system, and its log: method, path, Range header, bytes of the answer."""

    endpoint: str
    filesystem: pafs.FileSystem
    log: list[tuple[str, str, str, int]] = field(default_factory=list)

    def gets(self) -> list[tuple[str, str, int]]:
        return [(path, asked, size) for method, path, asked, size in self.log if method == "GET"]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    server_module = pytest.importorskip("moto.server")
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    filesystem = pafs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    state = S3(endpoint, filesystem)
    werkzeug = server._server  # moto offers no request log, so its WSGI application is wrapped
    application = werkzeug.app

    def recording(environ: dict[str, Any], start_response: Any) -> Any:
        sizes: list[int] = []

        def starting(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            sizes.extend(int(value) for name, value in headers if name.lower() == "content-length")
            return start_response(status, headers, *rest)

        body = application(environ, starting)
        asked = environ.get("HTTP_RANGE", "")
        state.log.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], asked, sum(sizes)))
        return body

    werkzeug.app = recording
    yield state
    server.stop()
    patch.undo()


@pytest.fixture
def s3(s3_server: S3) -> S3:
    s3_server.filesystem.create_dir("corpora")
    s3_server.log.clear()
    return s3_server
