"""The list of a checkpoint's files with their sizes and SHA-256, written last: a checkpoint is whole if it fits it."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from e2mc_hf.errors import UsageError
from e2mc_hf.training.durable_files import write_durably

NAME = "manifest.json"
FORMAT = 1
_PACKAGES = ("torch", "transformers", "e2mc-hf")
# SHA-256 releases the interpreter: a few files at once keep up with a fast disk.
_THREADS = 4
_BLOCK = 1 << 20


class DamagedCheckpointError(UsageError):
    """A checkpoint is not as it was written."""


def write_manifest(folder: Path, step: int, *, processes: int = 1) -> int:
    """Write the manifest of a folder whose files are all there, and wait until the disk has it.

    Files that were just written are read from memory, not from the disk.

    Args:
        folder: Checkpoint, as far as it is written.
        step: Optimizer steps taken.
        processes: Processes that train together.

    Returns:
        Bytes of all files but the manifest.

    Raises:
        OSError: If a file cannot be read, or the manifest not be written.
    """
    names = _files_in(folder)
    sizes = {name: (folder / name).stat().st_size for name in names}
    digests = dict(zip(names, _digests(folder / name for name in names), strict=True))
    body = {
        "format": FORMAT,
        "step": step,
        "processes": processes,
        "versions": {name: _version(name) for name in _PACKAGES},
        "files": {name: {"bytes": sizes[name], "sha256": digests[name]} for name in names},
    }
    write_durably(folder / NAME, _sealed(body))
    return sum(sizes.values())


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """Manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: If there is none, or it is not as it was written.
    """
    manifest, problem = _read(Path(folder))
    if manifest is None:
        raise _damaged(Path(folder), [problem])
    return manifest


def verify(folder: Path | str) -> None:
    """Compare every byte of a checkpoint with its manifest.

    Raises:
        DamagedCheckpointError: If a file is missing, altered or not listed; names each.
    """
    problems = problems_of(Path(folder))
    if problems:
        raise _damaged(Path(folder), problems)


def problems_of(folder: Path) -> list[str]:
    """What of a checkpoint is not as it was written, a line for each file; nothing if it is whole."""
    manifest, problem = _read(folder)
    if manifest is None:
        return [problem]
    listed = manifest["files"]
    found = set(_files_in(folder))
    problems = [f"{name} is missing" for name in listed if name not in found]
    problems += [f"{name} is not in the manifest" for name in sorted(found - listed.keys())]
    to_hash = []
    for name in sorted(found & listed.keys()):
        size, expected = (folder / name).stat().st_size, listed[name]["bytes"]
        if size == expected:
            to_hash.append(name)
        else:
            problems.append(f"{name} has {size:,} bytes in place of {expected:,}")
    digests = _digests((folder / name for name in to_hash), unreadable="")
    return problems + [
        f"{name} {'is altered' if digest else 'cannot be read'}"
        for name, digest in zip(to_hash, digests, strict=True)
        if digest != listed[name]["sha256"]
    ]


def current_versions() -> dict[str, str]:
    """Versions that a manifest written now would record."""
    return {name: _version(name) for name in _PACKAGES}


def _read(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Manifest, or None and what is wrong with it."""
    path = folder / NAME
    if not path.is_file():
        return None, f"{NAME} is missing"
    try:
        text = path.read_text(encoding="utf-8")
        body = json.loads(text)
        body.pop("sha256")
        whole = text == _sealed(body)
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        return None, f"{NAME} is altered"
    if body["format"] != FORMAT:
        return None, f"{NAME} has format {body['format']}, this version reads {FORMAT}"
    return body, ""


def _sealed(body: dict[str, Any]) -> str:
    """Text of a manifest, which ends with its own SHA-256: an altered digest in it must not accuse a good file."""
    seal = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps(body | {"sha256": seal}, indent=1)


def _damaged(folder: Path, problems: list[str]) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{str(folder)!r} must be a whole checkpoint, got: {'; '.join(problems)}.")


def _files_in(folder: Path) -> list[str]:
    """Relative names of all files below a folder but the manifest, in order."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    return sorted(name for name in names if name != NAME)


def _digests(paths: Iterable[Path], *, unreadable: str | None = None) -> list[str]:
    """SHA-256 of each file; `unreadable` in the place of one that cannot be read, where that is given."""

    def digest_of(path: Path) -> str:
        try:
            return _digest(path)
        except OSError:
            if unreadable is None:
                raise
            return unreadable

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest_of, paths))


def _digest(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"  # run from a folder of sources
