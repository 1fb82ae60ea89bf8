import io
import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from models.conv4 import conv4_backbone
from models.hostile_files import (
    archive,
    call,
    executing,
    hostile_files,
    mapping,
    mutated,
    name,
    original,
    storage,
    tensor,
    text,
)

from e2mc_hf.errors import UsageError
from e2mc_hf.models.checkpoint_files import read_checkpoint
from e2mc_hf.models.safe_pickle import DISCARDED, Discarded, UnsafeFileError, read_claims

ROOT = Path(__file__).parents[2]
CONTAINERS = ("archive", "legacy", "safetensors")
MOST_SECONDS, MOST_GROWTH = 5.0, 200 << 20


def open_all(files: dict[str, bytes], folder: Path) -> list[dict]:
    """Open files in another process; what became of each, in their order."""
    (folder / "files").mkdir()
    for number, content in enumerate(files.values()):
        (folder / "files" / f"{number:04}.pth").write_bytes(content)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, str(Path(__file__).with_name("hostile_worker.py")), "files", "report.jsonl"]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    names = list(files)
    assert len(lines) == len(files), f"ended at {names[len(lines)]!r} with code {answer.returncode}: {answer.stderr}"
    assert (answer.returncode, sorted(path.name for path in folder.iterdir())) == (0, ["files", "report.jsonl"])
    assert len(list((folder / "files").iterdir())) == len(files)
    return [line | {"file": name} for name, line in zip(names, lines, strict=True)]


def check_harmless(lines: list[dict], largest: int) -> None:
    for line in lines:
        assert line["events"] == [], f"{line['file']} made the process do something"
        assert line["outcome"] in ("refused", "loaded"), f"{line['file']}: {line['outcome']} {line['message']}"
        assert line["seconds"] <= MOST_SECONDS, f"{line['file']} took {line['seconds']:.1f} s"
        assert line["grown"] <= 2 * largest + MOST_GROWTH, f"{line['file']} took {line['grown']:,} bytes"


def mutants(good: dict[str, bytes], count: int) -> dict[str, bytes]:
    draw = random.Random(0)
    kinds = [draw.choice(list(good)) for _ in range(count)]
    return {f"{kind} {number}": mutated(good[kind], draw) for number, kind in enumerate(kinds)}


@pytest.fixture(scope="session")
def hostile():
    """Hostile files by what they try; those that run something would make a file `canary` in the folder they are in."""
    return hostile_files("canary")


def fuzz(hostile: dict[str, bytes], count: int, folder: Path) -> None:
    state = conv4_backbone().model.state_dict()
    good = {kind: original(state, kind) for kind in CONTAINERS}
    changed = mutants(good, count)
    files = good | hostile | changed
    lines = {line["file"]: line for line in open_all(files, folder)}
    check_harmless(list(lines.values()), max(map(len, files.values())))
    (unharmed,) = {lines[kind]["message"] for kind in good if lines[kind]["outcome"] == "loaded"}
    assert [what for what in hostile if lines[what]["outcome"] != "refused"] == []
    outcomes = Counter((what.split()[0], lines[what]["outcome"]) for what in changed)
    assert all(outcomes[kind, "refused"] >= count / 12 for kind in good)
    # Only archives have checksums: what of them loads in spite of a change has every weight as it was.
    loaded = [line for what, line in lines.items() if what.startswith("archive ") and line["outcome"] == "loaded"]
    assert {line["message"] for line in loaded} <= {unharmed}
    slowest = max(lines.values(), key=lambda line: line["seconds"])
    print(f"{len(hostile)} hostile files refused; {count} mutated ones: {dict(outcomes)}")
    total = sum(line["seconds"] for line in lines.values())
    print(f"slowest: {slowest['file']} in {slowest['seconds']:.2f} s; all: {total:.1f} s")
    print(f"grown by at most {max(line['grown'] for line in lines.values()) / 2**20:.0f} MB")


def test_nothing_in_a_hostile_or_damaged_file_is_executed_and_each_ends_in_a_typed_error(hostile, tmp_path):
    fuzz(hostile, 200, tmp_path)


@pytest.mark.slow
def test_nothing_is_executed_in_a_thousand_damaged_files(hostile, tmp_path):
    fuzz(hostile, 1000, tmp_path)


@pytest.mark.parametrize("what", ["os.system", "posix.system", "eval", "exec", "getattr"])
def test_the_attack_would_have_worked_on_a_reader_that_trusts(what, tmp_path):
    canary = tmp_path / "canary"
    data = mapping(executing(str(canary))[what])
    (tmp_path / "bad.pth").write_bytes(archive(data))
    with pytest.raises(UsageError, match="Nothing of it was executed"):
        read_checkpoint(tmp_path / "bad.pth")
    assert not canary.exists()
    pickle.loads(data)
    assert canary.exists()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("posix.system, archive", "refers to 'posix.system', which is neither a tensor nor a plain value"),
        ("getattr, legacy", "refers to 'builtins.getattr'"),
        ("storage of a tera, archive", "claims 4,000,000,000,000 bytes where it has"),
        ("shape of a tera, archive", "holds a tensor of 1,000,000,000,000 numbers where 2 are stored"),
        ("stride of zero, archive", "holds a tensor of 1,000,000,000,000 numbers where 2 are stored"),
        ("wide key, archive", "has a dictionary whose keys are neither texts nor counts"),
        ("bomb of zeros", "is compressed, which torch.save never does"),
        ("storage larger than its entry", "claims 12 bytes for storage '0' and holds 8"),
        ("two directories", "its directory is not at its end"),
        ("entry twice", "its directory holds a name twice"),
        ("entries that overlap", "its entries overlap or end outside"),
        ("tensors that share without end", "claims 400,000 bytes of tensors where it has"),
        ("storage of another length", "a storage has another length than its tensors need"),
        ("numbers cut off", "is cut off: it has"),
        ("protocol 4", "uses protocol 4 of pickle, where torch.save writes 2"),
        ("TorchScript", "is a program (TorchScript); save its state dict"),
        ("header of 17 MB", "has a header of 17,"),
        ("web page", "is a web page; download the file itself"),
        ("pointer of git LFS", "is a pointer of git LFS; fetch the file itself"),
        ("plain pickle", "is a pickle that torch.save did not write"),
        ("image", "is of no known kind"),
        ("empty", "is empty"),
    ],
)
def test_the_message_names_the_file_the_reason_and_a_remedy(hostile, tmp_path, what, reason):
    path = tmp_path / "found.pth"
    path.write_bytes(hostile[what])
    with pytest.raises(UsageError) as refusal:
        read_checkpoint(path)
    message = str(refusal.value)
    assert message.startswith("`file` must be a checkpoint of tensors and plain values, got 'found.pth', which ")
    assert reason in message
    assert message.endswith("Download it anew; or, where you trust it, save its state dict alone as safetensors.")


@pytest.mark.parametrize("path", ["nowhere.pth", ".", "/dev/zero"])
def test_what_is_no_file_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_good_file_gives_back_every_bit(tmp_path, kind):
    state = {
        "float": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(2, 2).bfloat16(),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 4).t(),
    }
    (tmp_path / "good").write_bytes(original(state, kind))
    content, record = read_checkpoint(tmp_path / "good")
    read = content if kind == "safetensors" else content["state_dict"]
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in state)
    assert record.container == {"archive": "torch archive", "legacy": "torch legacy"}.get(kind, kind)
    assert (record.name, record.size) == ("good", (tmp_path / "good").stat().st_size)


def test_parameters_and_tensors_that_share_numbers_are_read(tmp_path):
    tied = torch.randn(4, 4)
    torch.save({"a": torch.nn.Parameter(tied), "b": tied, "row": tied[2]}, tmp_path / "good")
    content, _ = read_checkpoint(tmp_path / "good")
    assert torch.equal(content["a"], tied)
    assert torch.equal(content["row"], tied[2])


def test_what_is_no_tensor_becomes_nothing_and_neither_argparse_nor_numpy_runs(tmp_path):
    import argparse

    import numpy as np

    content = {"w": torch.ones(2), "args": argparse.Namespace(lr=0.1, name="x"), "loss": np.float64(0.5)}
    torch.save(content, tmp_path / "good")
    read, _ = read_checkpoint(tmp_path / "good")
    assert (type(read["args"]), type(read["loss"])) == (Discarded, Discarded)
    assert vars(read["args"]) == {}


def test_the_list_of_names_is_forgotten_after_reading(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"w": torch.ones(2)}, tmp_path / "good")
    read_checkpoint(tmp_path / "good")
    assert set(torch.serialization.get_safe_globals()) == before


def claims_of(pickled: bytes, available: int = 1000):
    return read_claims(io.BytesIO(pickled), available)


def test_claims_are_counted_without_making_anything():
    claims = claims_of(b"\x80\x02}(" + text("a") + tensor(6, [2, 3], [3, 1]) + text("b") + tensor(6, [6], [1]) + b"u.")
    assert list(claims.value) == ["a", "b"]
    assert claims.tensor_bytes == 48
    assert [(s.key, s.item_size, s.numel) for s in claims.storages.values()] == [("0", 4, 6)]


@pytest.mark.parametrize("last", [5, 6])
def test_a_tensor_may_reach_to_the_last_number_and_no_further(last):
    pickled = mapping(tensor(6, [2], [5], offset=last - 5))
    if last == 5:
        assert claims_of(pickled).tensor_bytes == 8
    else:
        with pytest.raises(UnsafeFileError, match="holds a tensor of 2 numbers where 6 are stored"):
            claims_of(pickled)


@pytest.mark.parametrize("available", [23, 24])
def test_a_storage_may_take_as_many_bytes_as_there_are(available):
    pickled = mapping(storage(6))
    if available == 24:
        assert claims_of(pickled, available).storages["0"].numel == 6
    else:
        with pytest.raises(UnsafeFileError, match="claims 24 bytes where it has 23"):
            claims_of(pickled, available)


def test_every_prefix_of_a_pickle_is_damaged():
    pickled = mapping(tensor(2, [2], [1]))
    claims_of(pickled)
    for length in range(len(pickled)):
        with pytest.raises(UnsafeFileError):
            claims_of(pickled[:length])


@pytest.mark.parametrize("path", DISCARDED)
def test_names_that_authors_files_hold_besides_tensors_stand_for_nothing(tmp_path, path):
    module, _, attribute = path.rpartition(".")
    function = name(module, attribute)
    for value in (function, function + b")\x81}b", function + b"(N\x88tR"):
        (tmp_path / "found.pth").write_bytes(archive(mapping(value), {"data/0": bytes(8)}))
        (read,) = read_checkpoint(tmp_path / "found.pth")[0].values()
        assert read is Discarded or vars(read) == {}


def test_only_makers_of_tensors_are_called():
    for function in (("torch", "FloatStorage"), ("posix", "system")):
        with pytest.raises(UnsafeFileError, match=r"calls 'torch\.FloatStorage'|refers to 'posix\.system'"):
            claims_of(mapping(call(*function, text("x"))))
