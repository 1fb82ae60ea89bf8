"""F20: nothing that a training writes holds a secret, and nothing of it is a pickle of the arguments."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training.tiny_runs import tiny_run

from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.saved_arguments import save_arguments, without_secrets

TOKEN = "hf_QwErTyUiOpAsDfGhJkLzXcVbNm123456"
PASSWORD = "correct-horse-battery"


def bytes_under(folder: Path) -> bytes:
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", PASSWORD)
    url = f"https://user:{PASSWORD}@example.org/images.tar?signature={PASSWORD}"
    trainer = tiny_run(
        tmp_path,
        max_steps=1,
        run_name=f"run-{PASSWORD}",
        trackio_space_id=PASSWORD,
        hub_model_id=f"me/{PASSWORD}",
        metric_for_best_model=url,
        regularizer_args={},
        accelerator_config={"split_batches": False},
    )
    assert trainer.args.hub_token is None
    trainer.args.hub_token = TOKEN  # past the check of the arguments
    trainer.args.lr_scheduler_kwargs = {"api_key": PASSWORD, "path": url}
    assert isinstance(trainer.train_dataset, ViewDataset)
    trainer.train_dataset.source = replace(trainer.train_dataset.source, name=url)  # type: ignore[type-var]
    trainer.train()
    trainer.save_model()
    written = bytes_under(tmp_path)
    assert b"training_args.json" in written
    assert b"https://example.org/images.tar" in written
    for secret in (TOKEN, PASSWORD):
        assert secret.encode() not in written
    assert b"training_args.bin" not in written
    assert not list(tmp_path.rglob("*.bin"))


def test_the_arguments_can_be_read(tmp_path: Path) -> None:
    save_arguments(E2MCTrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=0.125), tmp_path)
    saved = json.loads((tmp_path / "training_args.json").read_text())
    assert saved["learning_rate"] == 0.125
    assert saved["lr_scheduler_type"] == "constant"
    assert saved["optimizer"] == "lars"
    assert not {"hub_token", "hub_model_id", "report_to", "run_name", "project", "push_to_hub"} & saved.keys()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://user:pw@host/a.tar", "https://host/a.tar"),
        ("https://host/a.tar?token=pw#pw", "https://host/a.tar"),
        (
            "s3://key:pw@bucket/{0..9}.tar and hf://datasets/me/photos",
            "s3://bucket/{0..9}.tar and hf://datasets/me/photos",
        ),
        ("https://user:p@w@host", "https://host"),
        (f"a {TOKEN} b", "a hf_... b"),
        ("/data/photos", "/data/photos"),
        ({"HF_TOKEN": 1, "apiKey": 2, "passwords": 3, "client_secret": 4, "lr": 5}, {"lr": 5}),
        ([{"token": "1"}, ("x", {"y"})], [{}, ["x", ["y"]]]),
        ({"reg_tokens": 4, "class_token": False, "key": None}, {"reg_tokens": 4, "class_token": False, "key": None}),
        (Path("/data"), "/data"),
        (None, None),
        (float("inf"), float("inf")),
    ],
)
def test_what_is_shown_of_a_value(value: Any, shown: Any) -> None:
    assert without_secrets(value) == shown


@settings(max_examples=200)
@given(st.text("abc:/?#@%. ", min_size=1), st.text("abc:?#%.&=", max_size=20))
def test_no_password_of_a_url_is_shown(user: str, place: str) -> None:
    name = user.replace("/", "").replace("?", "").replace("#", "").replace(" ", "")
    assert "p4ssw0rd" not in without_secrets(SimpleNamespace(url=f"https://{name}:p4ssw0rd@host/{place}").url)
