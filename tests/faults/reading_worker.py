"""What one of several processes does to read shards: in a file of its own, which a new process imports quickly."""

import time

from e2mc_hf.data import remote_files
from e2mc_hf.data.retrying import RemoteFileError, RetryPolicy
from e2mc_hf.data.shards import open_shards
from e2mc_hf.distributed import rank, run_on_first

QUICK = RetryPolicy(patience=60, request_timeout=0.15, first_wait=0.001, longest_wait=0.01)


def read_sets(sets: list[list[str]]) -> list[tuple[str, int | None, float]]:
    """For each list of URLs, what came of reading it together: the outcome, its status, and the seconds it took."""
    remote_files.DEFAULT_POLICY = QUICK
    return [read_together(urls) for urls in sets]


def read_together(urls: list[str]) -> tuple[str, int | None, float]:
    """Open shards on the first process, and read every other one here."""
    begin = time.monotonic()
    try:
        shards = run_on_first(lambda: open_shards(urls, "parquet", "image"))
        own = [row for shard in shards[rank() :: 2] for row in shard.read(0, shard.rows)]
        return f"{len(own)} rows", None, time.monotonic() - begin
    except RemoteFileError as error:
        return str(error), error.status, time.monotonic() - begin
