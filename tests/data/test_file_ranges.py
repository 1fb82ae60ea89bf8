import os

import fsspec
import pytest

from e2mc_hf.data.file_ranges import without_secrets
from e2mc_hf.data.remote_files import open_file
from e2mc_hf.data.retrying import RemoteFileError, RetryPolicy

QUICK = RetryPolicy(first_wait=0.001)
CONTENT = bytes(range(256)) * 1000


def test_other_file_systems_are_read_too():
    fsspec.filesystem("memory").pipe_file("/some/noise.bin", CONTENT)
    with open_file("memory://some/noise.bin") as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == CONTENT[-10:]


@pytest.mark.parametrize(
    "url", ["memory://none.bin", "nonsense://a.bin", "hf://a.bin", "hf://datasets/a/b", "http://", "http://[a.bin"]
)
def test_a_url_without_a_file_is_a_usage_error(url):
    with pytest.raises(RemoteFileError):
        open_file(url)


class _Flaky(fsspec.AbstractFileSystem):
    """Every first try fails."""

    protocol = "flaky"
    fails = True

    def _next(self) -> None:
        type(self).fails = not type(self).fails
        if not type(self).fails:
            raise ConnectionResetError

    def info(self, path, **kwargs):
        self._next()
        return {"name": path, "size": len(CONTENT), "type": "file"}

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._next()
        return CONTENT[start:end]


def test_faults_of_other_file_systems_are_passed_over():
    fsspec.register_implementation("flaky", _Flaky, clobber=True)
    with open_file("flaky://noise.bin", policy=QUICK) as file:
        assert file.read() == CONTENT


class _Forbidden(_Flaky):
    """Refuses like a store that speaks HTTP."""

    protocol = "forbidden"

    def _next(self) -> None:
        error = OSError("no")
        error.status = 403
        raise error


def test_a_refusal_of_another_file_system_is_final():
    fsspec.register_implementation("forbidden", _Forbidden, clobber=True)
    with pytest.raises(RemoteFileError, match="status 403"):
        open_file("forbidden://noise.bin")


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_network(monkeypatch):
    fsspec.register_implementation("flaky", _Flaky, clobber=True)
    monkeypatch.setattr(_Flaky, "info", lambda self, path: {}["size"])
    with pytest.raises(KeyError):
        open_file("flaky://noise.bin")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:word@host:1/a/b.tar?signature=x#y", "https://host:1/a/b.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("https://user:word@[host/a.tar?signature=x", "https://..."),
        ("/data/a?b#c@d.tar", "/data/a?b#c@d.tar"),
        ("hf://datasets/a/b/what?#1.parquet", "hf://datasets/a/b/what?#1.parquet"),
        ("hf://datasets/a/b@refs%2Fpr%2F1/c.parquet", "hf://datasets/a/b@refs%2Fpr%2F1/c.parquet"),
    ],
)
def test_urls_are_shown_without_secrets(url, shown):
    assert without_secrets(url) == shown
