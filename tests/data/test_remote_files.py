import io
import os
import pickle
import shutil
import subprocess
import tarfile
import time

import numpy as np
import pyarrow as pa
import pytest
from faults.fault_server import PERMANENT, TRANSIENT, Faults, FaultServer
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from e2mc_hf.data.http_ranges import OPENING_SIZE
from e2mc_hf.data.remote_files import MAX_READ_AHEAD, MIN_REQUEST, open_file, read_if_there
from e2mc_hf.data.retrying import RemoteFileError, RemoteFileUnreachableError, RetryPolicy
from e2mc_hf.errors import UsageError

QUICK = RetryPolicy(patience=20, request_timeout=0.25, first_wait=0.001, longest_wait=0.01)
CONTENT = np.random.default_rng(0).bytes(1_000_003)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "noise.bin").write_bytes(CONTENT)
    (folder / "empty.bin").touch()
    (folder / "long.bin").write_bytes(CONTENT * 30)
    return folder


@pytest.fixture
def server(folder):
    with FaultServer(folder) as server:
        yield server


def test_a_path_opens_the_file_on_the_disk(folder):
    with open_file(str(folder / "noise.bin")) as file:
        assert file.read() == CONTENT


def test_a_missing_path_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_file(str(tmp_path / "none.bin"))


def test_an_image_that_a_server_does_not_have_is_missing_and_one_it_refuses_is_an_error(folder):
    with FaultServer(folder) as server:
        assert read_if_there(server.url("noise.bin")) == CONTENT
        assert read_if_there(server.url("none.bin")) is None
    with FaultServer(folder, Faults(("403",), 1.0)) as server, pytest.raises(RemoteFileError, match="403"):
        read_if_there(server.url("noise.bin"))


def test_a_remote_file_is_read_whole(server):
    with open_file(server.url("noise.bin")) as file:
        assert file.read() == CONTENT
        assert file.read() == b""
        assert file.seekable()
        assert file.readable()
        assert not file.writable()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_an_empty_remote_file_is_empty(server):
    with open_file(server.url("empty.bin")) as file:
        assert file.read() == b""
        assert file.seek(0, os.SEEK_END) == 0


MOVES = st.tuples(
    st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]),
    st.integers(-1_100_000, 1_100_000),
    st.sampled_from([0, 1, 100, MIN_REQUEST, 300_000, -1, None]),
)


@settings(max_examples=150)
@given(st.lists(MOVES, max_size=6), st.booleans(), st.booleans())
def test_any_reads_give_the_bytes_of_the_file(shared_server, moves, is_size_known, at_end):
    name = "noise.parquet" if at_end else "noise.bin"
    local = io.BytesIO(CONTENT)
    with open_file(shared_server.url(name), size=len(CONTENT) if is_size_known else None, policy=QUICK) as remote:
        for whence, offset, size in moves:
            origin = [0, local.tell(), len(CONTENT)][whence]
            if origin + offset >= 0:
                assert remote.seek(offset, whence) == local.seek(offset, whence)
            assert remote.read(size) == local.read(size)
            assert remote.tell() == local.tell()


@pytest.fixture(scope="module")
def shared_server(folder):
    """One for all examples; a tenth of its answers break off."""
    shutil.copy(folder / "noise.bin", folder / "noise.parquet")
    with FaultServer(folder, Faults(("short body", "reset before", "wrong range"), share=0.1)) as server:
        yield server


def test_a_position_before_the_file_is_refused(server):
    with open_file(server.url("noise.bin")) as file, pytest.raises(ValueError, match="got -1"):
        file.seek(-1)


def test_lines_and_buffers_can_be_read(server):
    with open_file(server.url("noise.bin")) as file:
        assert file.readline() == io.BytesIO(CONTENT).readline()
        file.seek(0)
        buffer = bytearray(1000)
        assert file.readinto(buffer) == 1000
        assert bytes(buffer) == CONTENT[:1000]


def test_opening_takes_one_request_for_the_size_and_the_first_bytes(server):
    with open_file(server.url("noise.bin")) as file:
        file.read(OPENING_SIZE)
    assert [request.wanted for request in server.log] == [f"bytes=0-{OPENING_SIZE - 1}"]


def test_a_file_of_known_size_is_opened_without_a_request(server):
    with open_file(server.url("noise.bin"), size=len(CONTENT)) as file:
        assert file.seek(0, os.SEEK_END) == len(CONTENT)
        assert server.log == []
        file.seek(500_000)
        assert file.read(10) == CONTENT[500_000:500_010]
    assert [request.wanted for request in server.log] == [f"bytes=500000-{500_000 + MIN_REQUEST - 1}"]


def test_a_large_read_is_one_request_and_no_byte_more(server):
    with open_file(server.url("long.bin"), size=len(CONTENT) * 30) as file:
        file.seek(7)
        assert file.read(20_000_000) == (CONTENT * 30)[7:20_000_007]
    assert [request.wanted for request in server.log] == ["bytes=7-20000006"]


def test_small_reads_in_sequence_take_few_requests_over_one_connection(server):
    with open_file(server.url("long.bin")) as file:
        assert b"".join(iter(lambda: file.read(10_000), b"")) == CONTENT * 30
    # 64 KiB, then doubled up to 8 MiB.
    assert len(server.log) <= 8 + 30_000_000 / MAX_READ_AHEAD + 1
    assert sum(request.sent for request in server.log) == len(CONTENT) * 30
    assert len({request.port for request in server.log}) == 1


def test_small_reads_here_and_there_fetch_little(server):
    with open_file(server.url("long.bin")) as file:
        for position in range(1_000_000, 29_000_000, 2_000_000):
            file.seek(position)
            file.read(100)
    assert sum(request.sent for request in server.log) == 15 * MIN_REQUEST


def write_parquet(path, rows: int = 400, row_group_size: int = 40) -> pa.Table:
    """A table with images of random bytes, 20 KB each."""
    rng = np.random.default_rng(rows)
    images = [{"bytes": rng.bytes(20_000), "path": f"{row}.jpg"} for row in range(rows)]
    table = pa.table({"image": images, "label": list(range(rows))})
    parquet.write_table(table, path, row_group_size=row_group_size, compression="none")
    return table


def test_the_footer_of_a_parquet_file_is_one_small_request(folder, server):
    write_parquet(folder / "images.parquet")
    with open_file(server.url("images.parquet")) as file:
        assert parquet.ParquetFile(file).metadata.num_rows == 400
    assert [(request.wanted, request.sent) for request in server.log] == [(f"bytes=-{OPENING_SIZE}", OPENING_SIZE)]


@pytest.mark.parametrize("pre_buffer", [True, False])
def test_a_parquet_file_is_read_in_few_requests(folder, server, pre_buffer):
    table = write_parquet(folder / "images.parquet")
    with open_file(server.url("images.parquet")) as file:
        opened = parquet.ParquetFile(file, pre_buffer=pre_buffer)
        groups = [opened.read_row_group(group) for group in range(opened.num_row_groups)]
    assert pa.concat_tables(groups).equals(table)
    assert len(server.log) <= 1 + 10
    assert sum(request.sent for request in server.log) < 1.05 * (folder / "images.parquet").stat().st_size


def test_real_photographs_stream_in_few_requests(photo_folder):
    name = "train-00000-of-00001.parquet"
    size = (photo_folder / name).stat().st_size
    with FaultServer(photo_folder) as server, open_file(server.url(name)) as file:
        opened = parquet.ParquetFile(file, pre_buffer=False)
        assert [request.sent for request in server.log] == [OPENING_SIZE]
        opened.read_row_group(20, columns=["image"])
        assert len(server.log) <= 3
        assert sum(request.sent for request in server.log) < 0.04 * size
        rows = sum(len(batch) for batch in opened.iter_batches(64, columns=["image"]))
        assert rows == opened.metadata.num_rows
        assert len(server.log) < 3 + 15 < opened.num_row_groups
        assert sum(request.sent for request in server.log) < 1.05 * size


def test_a_tar_file_is_read_member_by_member(folder, server):
    with tarfile.open(folder / "images.tar", "w") as archive:
        for number in range(200):
            member = tarfile.TarInfo(f"{number:03}.jpg")
            member.size = 5_000 + number
            archive.addfile(member, io.BytesIO(CONTENT[number : number + member.size]))
    with open_file(server.url("images.tar")) as file, tarfile.open(fileobj=file) as archive:
        for number, member in enumerate(archive):
            assert archive.extractfile(member).read() == CONTENT[number : number + member.size]
    assert number == 199
    assert len(server.log) <= 8


@pytest.mark.parametrize("kind", TRANSIENT)
def test_every_fault_that_passes_is_passed_over(folder, kind):
    with (
        FaultServer(folder, Faults((kind,), first_times=2, stall=1)) as server,
        open_file(server.url("noise.bin"), policy=QUICK) as file,
    ):
        file.seek(300_000)
        assert file.read(9) == CONTENT[300_000:300_009]
    assert {request.fault for request in server.log} == {kind, None}


def test_what_arrived_before_a_fault_is_not_asked_for_again(folder):
    with FaultServer(folder, Faults(("short body",), first_times=3)) as server:
        with open_file(server.url("long.bin"), size=len(CONTENT) * 30, policy=QUICK) as file:
            assert file.read() == CONTENT * 30
        assert [request.fault for request in server.log] == ["short body"] * 3 + [None]
        assert sum(request.sent for request in server.log) == len(CONTENT) * 30


def test_a_trickle_is_a_stall(folder):
    policy = RetryPolicy(request_timeout=0.2, first_wait=0.001)
    with FaultServer(folder, Faults(("trickle",), first_times=1)) as server:
        with open_file(server.url("noise.bin"), size=len(CONTENT), policy=policy) as file:
            assert file.read(1000) == CONTENT[:1000]
        assert [request.fault for request in server.log] == ["trickle", None]


def test_a_server_that_never_recovers_is_given_up_in_time(folder):
    policy = RetryPolicy(patience=0.5, request_timeout=0.1, first_wait=0.01, longest_wait=0.1)
    with FaultServer(folder, Faults(("503", "reset before", "stall before"), stall=1)) as server:
        begin = time.monotonic()
        with pytest.raises(RemoteFileUnreachableError, match=r"noise.bin after \d+ failed tries and [01] s"):
            open_file(server.url("noise.bin"), policy=policy)
        assert time.monotonic() - begin < 3
        assert len(server.log) >= 3


def test_a_server_that_is_not_there_is_given_up_in_time():
    with pytest.raises(RemoteFileUnreachableError, match="ConnectError"):
        open_file("http://127.0.0.1:9/a.bin", policy=RetryPolicy(patience=0.1, first_wait=0.01))


@pytest.mark.parametrize("kind", PERMANENT)
def test_a_refusal_is_an_error_at_the_first_request(folder, kind):
    with FaultServer(folder, Faults((kind,))) as server:
        with pytest.raises(RemoteFileError, match=f"noise.parquet was refused with status {kind}") as refused:
            open_file(server.url("noise.parquet"))
        assert len(server.log) == 1
    assert isinstance(refused.value, UsageError)
    assert refused.value.status == int(kind)
    assert refused.value.url == server.url("noise.parquet")


@pytest.mark.parametrize("kind", PERMANENT)
def test_a_refusal_amid_a_file_keeps_its_type_through_arrow_and_tarfile(folder, kind):
    write_parquet(folder / "images.parquet")
    with FaultServer(folder) as server:
        with open_file(server.url("images.parquet")) as file:
            opened = parquet.ParquetFile(file)
            server.faults = Faults((kind,))
            with pytest.raises(RemoteFileError):
                opened.read_row_group(3)
        with open_file(server.url("images.tar"), size=1_000_000) as file, pytest.raises(RemoteFileError):
            tarfile.TarFile(fileobj=file)
        assert len(server.log) == 3


def test_a_server_without_ranges_is_told_from_a_broken_one(folder):
    with (
        FaultServer(folder, Faults(("no range",))) as server,
        open_file(server.url("noise.bin")) as file,
    ):
        assert file.read(100) == CONTENT[:100]
        file.seek(500_000)
        with pytest.raises(RemoteFileError, match="does not answer range requests"):
            file.read(100)


@pytest.mark.parametrize("kind", ["no suffix", "suffix refused"])
def test_a_server_that_cannot_count_from_the_end_will_do(folder, kind):
    table = write_parquet(folder / "images.parquet")
    with FaultServer(folder, Faults((kind,))) as server, open_file(server.url("images.parquet")) as file:
        assert parquet.read_table(file).equals(table)
        assert len(server.log) <= 4


def test_a_file_that_changes_while_it_is_read_is_an_error(folder, server):
    (folder / "changing.bin").write_bytes(CONTENT)
    with open_file(server.url("changing.bin")) as file:
        (folder / "changing.bin").write_bytes(CONTENT[:-1])
        file.seek(500_000)
        with pytest.raises(RemoteFileError, match="now has 1000002 bytes, 1000003 when it was opened"):
            file.read(1)


def test_passwords_and_signatures_stay_out_of_messages(folder, caplog):
    with FaultServer(folder, Faults(("503",), first_times=1)) as server:
        url = server.url("none.bin?X-Signature=geheim#geheim").replace("http://", "http://user:geheim@")
        with pytest.raises(RemoteFileError) as refused:
            open_file(url, policy=QUICK)
    assert "geheim" not in f"{refused.value} {refused.value.url} {caplog.text}"
    assert "none.bin: status 503" in caplog.text
    assert refused.value.status == 404


def test_an_open_file_is_not_pickled_unnoticed(server):
    with open_file(server.url("noise.bin")) as file, pytest.raises(TypeError, match="Send its URL"):
        pickle.dumps(file)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_a_certificate_that_is_not_trusted_is_an_error_at_once(folder, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -subj /CN=localhost -days 2"
    subprocess.run(command.split(), check=True, capture_output=True)
    with FaultServer(folder, certificate=(certificate, key)) as server:
        with pytest.raises(RemoteFileError, match="certificate is not trusted"):
            open_file(server.url("noise.bin"))
        assert server.log == []
