"""Sources on S3, read through Arrow's own S3 client from a small server of this test: listing, ranges, refusals."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.errors import NotFoundError, UnavailableError, UsageError
from feature_store.point_in_time.engine import EngineSettings, connect
from feature_store.point_in_time.latest import Pull, pull_latest

T0 = datetime(2025, 1, 1, tzinfo=UTC)


class _S3(BaseHTTPRequestHandler):
    """What a reader needs of S3: HEAD and GET of objects, with ranges, and ListObjectsV2, out of a directory."""

    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        """Quiet."""

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, size: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        if bucket != "bucket":
            self._answer(403)
        elif not key:
            self._list(parse_qs(parts.query))
        elif not (self.root / key).is_file():
            self._answer(404)
        else:
            data = (self.root / key).read_bytes()
            headers = {"Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT", "ETag": '"x"', "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range")
            if wanted is None:
                self._answer(200, data, headers)
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
            self._answer(206, data[int(first) : end + 1], headers)

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        keys = sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())
        found = [k for k in keys if k.startswith(prefix)]
        items = "".join(
            f"<Contents><Key>{escape(k)}</Key><Size>{(self.root / k).stat().st_size}</Size>"
            "<LastModified>2025-01-01T00:00:00.000Z</LastModified></Contents>"
            for k in found
        )
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>bucket</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
        ).encode()
        self._answer(200, body, {"Content-Type": "application/xml"})


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "objects"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (_S3,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield root
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


def _write(path: Path, keys: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = pa.array([T0] * len(keys), pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"k": keys, "event_timestamp": times, "v": [10 * k for k in keys]}), path)


def _latest(place: str) -> dict[int, int]:
    pull = Pull("source s", place, "look", ("k",), ("v",), "event_timestamp", None, None, None)
    with connect(EngineSettings(threads=1)) as con:
        return {r["k"]: r["v"] for r in pull_latest(con, pull).to_pylist()}


def test_a_directory_and_a_file_on_s3_are_read(objects: Path) -> None:
    _write(objects / "table/a.parquet", [1, 2])
    _write(objects / "table/deep/b.parquet", [3])
    _write(objects / "table/.b.parquet.tmp.parquet", [4])  # unfinished
    assert _latest("s3://bucket/table") == {1: 10, 2: 20, 3: 30}
    assert _latest("s3://bucket/table/a.parquet") == {1: 10, 2: 20}


def test_a_place_without_files_and_one_that_is_refused_are_told_apart(objects: Path) -> None:
    with pytest.raises(NotFoundError, match="source s: no Parquet files: 's3://bucket/absent'"):
        _latest("s3://bucket/absent")
    with pytest.raises(UnavailableError, match=r"source s: the remote cannot be listed: .*'s3://other/x'"):
        _latest("s3://other/x")
    with pytest.raises(UsageError, match="a remote place has no wildcards"):
        _latest("s3://bucket/*.parquet")
