import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import httpx

from e2mc_hf.arguments import DataArguments
from e2mc_hf.data.load_errors import cause, load_failure

IMAGENET = DataArguments(dataset="ILSVRC/imagenet-1k")
PAGE = "https://huggingface.co/datasets/ILSVRC/imagenet-1k"


def refusal(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx.Request("GET", f"{PAGE}/resolve/main/README.md")
    return kind(f"{status} Client Error", response=httpx.Response(status, request=request))


def raised(error: Exception, *, by: Exception | None = None, hidden: bool = False) -> Exception:
    """The error as it comes out of a library: raised from another one, or with that one hidden."""
    try:
        try:
            if by is not None:
                raise by
        except Exception as inner:
            if hidden:
                raise error from None
            raise error from inner
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_gated_dataset_is_told_by_its_type_wherever_it_is_in_the_chain(status, hidden):
    gated = refusal(GatedRepoError, status)
    for error in (gated, raised(FileNotFoundError("README.md"), by=gated, hidden=hidden)):
        message = load_failure(IMAGENET, error)
        assert "which is gated" in message
        assert f"Accept its terms at {PAGE} and set HF_TOKEN" in message
        assert "\n" not in message


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_without_a_reason_names_page_and_token_all_the_same(status):
    message = load_failure(IMAGENET, refusal(HfHubHTTPError, status))
    assert "which the Hub refuses" in message
    assert f"{PAGE}; set HF_TOKEN" in message


def test_a_missing_repository_is_not_called_gated_though_the_hub_says_401():
    missing = raised(DatasetNotFoundError("Dataset 'a/b' doesn't exist"), by=refusal(RepositoryNotFoundError, 401))
    message = load_failure(DataArguments(dataset="a/b"), missing)
    assert "(DatasetNotFoundError: Dataset 'a/b' doesn't exist). Check the name" in message


@pytest.mark.parametrize("error", [ConnectionError("no route"), refusal(HfHubHTTPError, 503)])
def test_a_hub_that_cannot_be_reached_is_not_blamed_on_the_name(error):
    assert "the Hub cannot be reached" in load_failure(IMAGENET, raised(FileNotFoundError("x"), by=error, hidden=True))


@pytest.mark.parametrize("files", ["{}", ["a.tar", "{}"]])
def test_passwords_and_signatures_stay_out_of_messages(files):
    url = "https://user:geheim@x.org/a.tar?signature=geheim'geheim"
    files = url if isinstance(files, str) else [file.format(url) for file in files]
    error = ValueError("no tar at https://user:geheim@x.org/a.tar?signature=geheim, really")
    message = load_failure(DataArguments(dataset="webdataset", data_files=files), error)
    assert "geheim" not in message
    assert message.count("https://x.org/a.tar") == 2


def test_a_cause_is_the_innermost_in_one_short_line():
    assert cause(raised(RuntimeError("outer"), by=ValueError("inner\n  line"))) == "ValueError: inner line"
    assert len(cause(ValueError("x" * 1000))) == 200
