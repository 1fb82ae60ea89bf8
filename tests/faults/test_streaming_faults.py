"""Streaming from a server that fails: all rows arrive, in order; or everyone knows at once why not."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data.shard_files import samples, write_parquet, write_tar
from faults.fault_server import PERMANENT, TRANSIENT, Faults, FaultServer, Request
from faults.reading_worker import QUICK, read_sets
from PIL import Image
from processes import run_on_processes
from pyarrow import parquet

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data import remote_files
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.loader import ViewLoader
from e2mc_hf.data.retrying import RemoteFileError
from e2mc_hf.data.shards import open_shards
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.data.views import ViewTransform

PARQUET = [f"{shard}.parquet" for shard in range(3)]
TARS = [f"{shard}.tar" for shard in range(2)]


@pytest.fixture
def quick(monkeypatch):
    """Do not wait as long as one would for a server far away."""
    monkeypatch.setattr(remote_files, "DEFAULT_POLICY", QUICK)


def encoded(number: int) -> bytes:
    """A photograph-sized file of noise, an image that can be decoded."""
    pixels = np.random.default_rng(number).integers(0, 256, (90, 110, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images():
    return [encoded(number) for number in range(90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        write_parquet(folder / f"{shard}.parquet", images[30 * shard : 30 * shard + 30], compression="none")
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", samples(images[45 * shard : 45 * shard + 45]))
    return folder


def read_all(server: FaultServer, names: list[str], at_once: int = 5) -> list[bytes | None]:
    """Open shards, and read each in pieces of a few rows: each piece opens its file anew."""
    kind, column = ("parquet", "image") if names[0].endswith(".parquet") else ("webdataset", "jpg")
    shards = open_shards([server.url(name) for name in names], kind, column)
    pieces = [(shard, start) for shard in shards for start in range(0, shard.rows, at_once)]
    return [row for shard, start in pieces for row in shard.read(start, min(start + at_once, shard.rows))]


def seed_that_spoils(requests: list[Request], kinds: tuple[str, ...], share: float) -> int:
    """The first seed that spoils about the wanted share of the requests of a faultless reading, and at least one."""
    wanted = max(1, round(share * len(requests)))

    def spoiled(seed: int) -> int:
        faults = Faults(kinds, share, seed)
        return sum(faults.of(request.path, request.wanted, 0) is not None for request in requests)

    return next(seed for seed in range(10_000) if spoiled(seed) == wanted)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("kind", TRANSIENT)
def test_all_rows_of_parquet_shards_arrive_in_order(quick, folder, images, kind, share):
    with FaultServer(folder) as server:
        assert read_all(server, PARQUET) == images
        requests, server.log = server.log, []
        server.faults = Faults((kind,), share, seed_that_spoils(requests, (kind,), share), stall=1)
        assert read_all(server, PARQUET) == images
        assert kind in {request.fault for request in server.log}


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("names", [PARQUET, TARS], ids=["parquet", "tar"])
def test_all_rows_arrive_in_order_whatever_comes_together(quick, folder, images, names, share):
    with FaultServer(folder) as server:
        assert read_all(server, names) == images
        requests, server.log = server.log, []
        server.faults = Faults(TRANSIENT, share, seed_that_spoils(requests, TRANSIENT, share), stall=1)
        assert read_all(server, names) == images
        assert {request.fault for request in server.log} > {None}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_all_real_photographs_arrive_in_order(quick, test_data, share):
    names = ["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"]
    tables = [parquet.read_table(test_data / "imagenette160" / name, columns=["image"]) for name in names]
    photographs = [row["bytes"] for table in tables for row in table.column("image").to_pylist()]
    with FaultServer(test_data / "imagenette160", Faults(TRANSIENT, share, stall=1)) as server:
        assert read_all(server, names, at_once=64) == photographs
        spoiled = sum(request.fault is not None for request in server.log)
        assert 0.5 * share < spoiled / len(server.log) < 2 * share


@pytest.mark.parametrize(
    ("kind", "header", "seconds"),
    [
        ("429", ("Retry-After", "1"), 1),
        ("503", ("Retry-After", "{date+2}"), 2),
        ("429", ("RateLimit", '"resolvers";r=0;t=1'), 1),
    ],
)
def test_waits_obey_the_server_within_a_second(folder, images, kind, header, seconds):
    with FaultServer(folder, Faults((kind,), first_times=1, headers=(header,))) as server:
        assert read_all(server, PARQUET[:1]) == images[:30]
        refused, repeated = server.log[:2]
        assert refused.fault == kind
        assert seconds - 0.01 <= repeated.began - refused.ended <= seconds + 1


@pytest.mark.parametrize("kind", PERMANENT)
@pytest.mark.parametrize("names", [PARQUET, TARS], ids=["parquet", "tar"])
def test_a_refusal_is_a_typed_error_at_the_first_request_of_each_file(folder, kind, names):
    with FaultServer(folder, Faults((kind,))) as server:
        with pytest.raises(RemoteFileError) as refused:
            read_all(server, names)
        assert refused.value.status == int(kind)
        assert max(len(server.requests(name)) for name in names) == 1


def test_two_processes_learn_of_a_missing_shard_at_once_and_of_a_fault_not_at_all(folder):
    with FaultServer(folder, Faults(("503", "reset during"), share=0.3)) as server:
        present, missing = [server.url("0.parquet"), server.url("2.parquet")], server.url("none.parquet")
        first, second = run_on_processes(read_sets, 2, [[*present, missing], present])
        refusals = [request for request in server.requests("none.parquet") if request.fault is None]
        assert len(refusals) == 1
        assert {request.fault for request in server.log} > {None}
    assert first[0][:2] == second[0][:2]
    assert first[0][1] == 404
    assert "none.parquet was refused with status 404" in first[0][0]
    assert max(first[0][2], second[0][2]) < 5
    assert first[1][0] == second[1][0] == "30 rows"


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
def test_eight_workers_ask_for_no_more_than_one_process_needs(folder, images):
    view = ViewTransform(ViewArguments(), ImageSettings(32))
    with FaultServer(folder) as server:
        shards = open_shards([server.url(name) for name in PARQUET], "parquet", "image")
        assert len(server.log) <= len(shards)
        source = StreamSource(shards, "image", "served", None)
        loader = ViewLoader(ViewDataset(source, view, seed=0), 8, rank=0, world_size=1, seed=0, num_workers=8)
        batches = iter(loader)
        assert len(next(batches)["views"]) == 2
        batches.close()
        assert len(server.log) <= 2 * len(shards) + 10


HUB_CLIENT = """
import json, sys, time
from e2mc_hf.data.remote_files import open_file
from e2mc_hf.errors import UsageError
from pyarrow import parquet

for url in sys.argv[1:]:
    begin = time.monotonic()
    try:
        with open_file(url) as file:
            outcome = [parquet.ParquetFile(file).read().num_rows, None]
    except UsageError as error:
        outcome = [str(error), error.status]
    print(json.dumps([*outcome, time.monotonic() - begin]))
"""


def run_client(urls: list[str], **environment: str) -> list[list]:
    """Open files in a process of its own: the Hub's address and proxies are read when it starts."""
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith(("_proxy", "offline"))}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", HUB_CLIENT, *urls],
        env=clean | environment | {"HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.fixture
def hub_folder(tmp_path, images):
    """Files as the Hub names them."""
    folder = tmp_path / "datasets" / "ours" / "images" / "resolve" / "main"
    folder.mkdir(parents=True)
    write_parquet(folder / "0.parquet", images)
    return tmp_path


def test_files_of_the_hub_are_read_with_one_request_a_part_and_the_token_stays_there(hub_folder, tmp_path):
    path = "datasets/ours/images/resolve/main/0.parquet"
    with FaultServer(hub_folder) as storage, FaultServer(hub_folder, redirect_to=storage.address) as hub:
        hub.faults = Faults(("429",), first_times=1, headers=(("RateLimit", '"resolvers";r=0;t=1'),))
        environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home")}
        by_name, by_address = run_client(["hf://datasets/ours/images/0.parquet", hub.url(path)], **environment)
        assert by_name[:2] == by_address[:2] == [90, None]
        assert by_name[2] >= 1
        assert [request.path for request in hub.log] == [path] * len(hub.log)
        assert len(hub.log) == len(storage.log) + 1 <= 8
        assert {request.headers.get("authorization") for request in hub.log} == {"Bearer hf_secret"}
        assert not any("authorization" in request.headers for request in storage.log)


def test_other_servers_are_not_shown_the_token(folder, tmp_path):
    with FaultServer(folder) as hub, FaultServer(folder) as stranger:
        environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home")}
        ((rows, _, _),) = run_client([stranger.url("0.parquet")], **environment)
        assert rows == 30
        assert not any("hf_secret" in str(request.headers) for request in stranger.log)


def test_the_hubs_refusals_say_what_to_do(hub_folder, tmp_path):
    url = "hf://datasets/ours/images@main/0.parquet"
    with FaultServer(hub_folder, Faults(("403",), headers=(("X-Error-Code", "GatedRepo"),))) as hub:
        ((message, status, _),) = run_client([url], HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "home"))
        assert status == 403
        assert f"HF_TOKEN or `hf auth login`, accept the conditions on {hub.url('datasets/ours/images')}" in message
        assert len(hub.log) == 1


def test_offline_mode_is_for_the_hub_alone(hub_folder, tmp_path):
    with FaultServer(hub_folder) as hub, FaultServer(hub_folder) as server:
        own = server.url("datasets/ours/images/resolve/main/0.parquet")
        refused, read = run_client(
            ["hf://datasets/ours/images/0.parquet", own],
            HF_ENDPOINT=hub.address,
            HF_HUB_OFFLINE="1",
            HF_HOME=str(tmp_path / "home"),
        )
        assert "HF_HUB_OFFLINE is set" in refused[0]
        assert hub.log == []
        assert read[0] == 90


def test_proxies_are_taken_from_the_environment(folder):
    with FaultServer(folder) as proxy:
        ((rows, _, _),) = run_client(["http://nowhere.invalid/0.parquet"], http_proxy=proxy.address)
        assert rows == 30
        assert {request.headers["host"] for request in proxy.log} == {"nowhere.invalid"}
