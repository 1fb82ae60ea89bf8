"""What to tell a user whose dataset cannot be loaded: one line with the cause and what to do."""

import re
from collections.abc import Container, Iterator
from pathlib import Path

from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from e2mc_hf.data.file_ranges import without_secrets
from e2mc_hf.image_arguments import BUILDERS, DataArguments

DENIED = (401, 403)
PASSING = (408, 429, *range(500, 600))
GATED_TEXT = "is a gated dataset on the Hub"  # `datasets` drops the typed error, and with it the status
SCRIPT_TEXT = "scripts are no longer supported"
LONGEST_CAUSE = 200
URL = re.compile(r"\w+://[^\s'\"<>]+")


def load_failure(arguments: DataArguments, error: BaseException) -> str:
    """Say in one line why a dataset could not be loaded and what to do.

    Args:
        arguments: What the user asked for.
        error: What was raised; the Hub client, `datasets`, Arrow and HTTP each have their own, one inside the other.
    """
    dataset, reason, links = arguments.dataset, cause(error), _links(error)
    if dataset in BUILDERS:
        files = arguments.data_files
        shown = [without_secrets(file) for file in files] if isinstance(files, list) else without_secrets(files or "")
        hint = " Files on the Hub that are not public need HF_TOKEN." if _status(links, DENIED) else ""
        return (
            f"`data_files` must be files that can be read as {dataset}, got {shown!r} ({reason})."
            f" Check the paths or URLs.{hint}"
        )
    if Path(dataset).expanduser().is_dir():
        return _folder_failure(dataset, reason, links)
    return _hub_failure(dataset, reason, links)


def cause(error: BaseException) -> str:
    """Shorten an exception, or the one it hides, to part of a line."""
    chain = list(_chain(error))
    telling = next((link for link in chain if isinstance(link, DatasetNotFoundError)), chain[-1])
    text = URL.sub(lambda url: without_secrets(url[0]), " ".join(f"{type(telling).__name__}: {telling}".split()))
    return text if len(text) <= LONGEST_CAUSE else f"{text[: LONGEST_CAUSE - 3]}..."


def _folder_failure(dataset: str, reason: str, links: list[BaseException]) -> str:
    if any(isinstance(link, (EmptyDatasetError, DataFilesNotFoundError)) for link in links):
        return (
            f"`dataset` must be a folder with parquet files, tars or images, got {dataset!r}, which holds none."
            " Fill it."
        )
    return (
        f"`dataset` must be a readable folder of parquet files, tars or images, got {dataset!r} ({reason})."
        " Repair its files, or check --dataset_config."
    )


def _hub_failure(dataset: str, reason: str, links: list[BaseException]) -> str:
    page = f"https://huggingface.co/datasets/{dataset}"
    if any(isinstance(link, GatedRepoError) or GATED_TEXT in str(link) for link in links):
        return (
            f"`dataset` must be one that your account may read, got {dataset!r}, which is gated ({reason})."
            f" Accept its terms at {page} and set HF_TOKEN to a token of that account."
        )
    missing = any(isinstance(link, RepositoryNotFoundError) for link in links)  # the Hub says 401 of these too
    if not missing and _status(links, DENIED):
        return (
            f"`dataset` must be one that your account may read, got {dataset!r}, which the Hub refuses ({reason})."
            f" If it is gated, accept its terms at {page}; set HF_TOKEN to a token of that account."
        )
    if any(SCRIPT_TEXT in str(link) for link in links):
        return (
            f"`dataset` must hold files, not a script that loads them, got {dataset!r} ({reason})."
            " Try --dataset_revision refs/convert/parquet, where the Hub keeps a copy of many as parquet."
        )
    if any(isinstance(link, ConnectionError) for link in links) or _status(links, PASSING):
        return (
            f"`dataset` must be `digits`, an existing folder or a Hub id, got {dataset!r}: no such folder, and the Hub"
            " cannot be reached. Check the path; for the Hub, the network and HF_HUB_OFFLINE."
        )
    return (
        f"`dataset` must be `digits`, an existing folder or a Hub id, got {dataset!r} ({reason})."
        " Check the name, --dataset_config, --dataset_revision and your access: a private one needs HF_TOKEN."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those it was raised from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _links(error: BaseException) -> list[BaseException]:
    """An exception with all that led to it, also those that `datasets` hides."""
    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        link = pending.pop()
        if link is not None and link not in found:
            found.append(link)
            pending += [link.__context__, link.__cause__]
    return found


def _status(links: list[BaseException], wanted: Container[int]) -> bool:
    """Whether a server answered with one of these HTTP statuses."""
    found = [getattr(getattr(link, "response", link), "status_code", None) for link in links]
    found += [getattr(link, "status", None) for link in links]
    return any(status in wanted for status in found if isinstance(status, int))
