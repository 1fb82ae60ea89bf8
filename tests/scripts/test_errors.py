import importlib.util
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from e2mc_hf.models.loading import load_backbone

SCRIPT = Path(__file__).parents[2] / "scripts" / "continue_pretrain.py"
GOOD = {
    "model": "test_resnet",
    "from_scratch": "true",
    "image_size": "32",
    "use_cpu": "true",
    "max_steps": "1",
    "max_samples": "16",
    "per_device_train_batch_size": "8",
    "objective_args": "projector_dim=16",
    "output_dir": "out",
}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder to run in, no network, and a cache of its own."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture(scope="module")
def main():
    """The script's entry point."""
    spec = importlib.util.spec_from_file_location("continue_pretrain", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def refusal(main, capsys, workplace):
    """The one line a run ends with; checks the exit code, and that the folder is as it was."""

    def run(*first: str, **options: str | None) -> str:
        before = contents(workplace)
        flags = [f"--{name}={value}" for name, value in (GOOD | options).items() if value is not None]
        with pytest.raises(SystemExit) as caught:
            main([*first, *flags])
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        assert caught.value.code == 2
        assert [line for line in lines if "error" in line.lower()] == lines[-1:]
        assert contents(workplace) == before
        return lines[-1].removeprefix("continue_pretrain.py: error: ")

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def test_the_run_that_the_errors_below_stop_is_a_good_one(main, workplace):
    main([f"--{name}={value}" for name, value in GOOD.items()])
    assert (workplace / "out" / "encoder" / "model.safetensors").is_file()


WRONG_OPTIONS = [
    ({"num_views": "two"}, "`num_views` must be of type int, got 'two'"),
    ({"learning_rate": "inf"}, "`learning_rate` must be of type float, got 'inf'"),
    ({"num_views": "1"}, "`num_views` must be at least 2, got 1"),
    ({"optimizer": "adam"}, "`optimizer` must be lars, adamw or sgd, got 'adam'"),
    ({"learning_rat": "1"}, "`learning_rat` is not an option. Did you mean 'learning_rate'?"),
    ({"gradient_accumulation_steps": "2"}, "`gradient_accumulation_steps` must be 1"),
    ({"gradient_accumulation_steps": "two"}, "`gradient_accumulation_steps` must be of type int, got 'two'"),
    ({"eval_steps": "often"}, "`eval_steps` must be of type float, got 'often'"),
    ({"lr_scheduler_type": "cosin"}, "`lr_scheduler_type` 'cosin' is refused: cosin is not a valid SchedulerType"),
    ({"logging_strategy": "never"}, "`logging_strategy` 'never' is refused: never is not a valid IntervalStrategy"),
    ({"optim": "adamw_torch"}, "`optim` has no effect here, got 'adamw_torch'"),
    ({"remove_unused_columns": "true"}, "`remove_unused_columns` must stay false"),
    ({"dataloader_num_workers": "-1"}, "`dataloader_num_workers` must not be negative, got -1"),
    ({"objective": "vicregg"}, "`objective` 'vicregg' is unknown. Did you mean 'vicreg'?"),
    ({"objective_args": "projector_dims=8"}, "`objective_args` has no option 'projector_dims'. Did you mean"),
    ({"objective_args": "projector_dim=8.5"}, "`objective_args` takes 'projector_dim' of type int, got 8.5"),
    ({"regularizer": "e3mc"}, "`regularizer` 'e3mc' is unknown. Did you mean 'e2mc'?"),
    ({"regularizer_args": "entropy=1"}, "`regularizer_args` has no option 'entropy'. Did you mean 'entropy_weight'?"),
    ({"regularizer_args": "eps=small"}, "`regularizer_args` takes 'eps' of type float, got 'small'"),
    ({"regularizer_args": "entropy_weight=-1"}, "`regularizer_args` does not fit: `entropy_weight` must not be"),
    ({"regularizer_args": "eps"}, "`regularizer_args` must be of type dict[str, typing.Any], got ['eps']"),
    ({"backbone_args": "depht=3"}, "`backbone_args` must fit the architecture"),
    ({"per_device_train_batch_size": "2"}, "`per_device_train_batch_size` times 1 processes must be at least 4, got 2"),
    ({"fp16": "true"}, "`fp16` needs a GPU, got 'cpu'. Pass --bf16 on the CPU."),
    ({"torch_compile_mode": "reduce-overhead"}, "`torch_compile_mode` must be default or max-autotune-no-cudagraphs"),
    ({"channels_last": "perhaps"}, "`channels_last` must be of type bool, got 'perhaps'"),
]


@pytest.mark.parametrize(("options", "complaint"), WRONG_OPTIONS)
def test_a_wrong_option_is_refused_before_anything_is_written(refusal, options, complaint):
    assert refusal(**options).startswith(complaint)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"output_dir": None}, "`output_dir`"),
        ({"output_dir": "/dev/null/run"}, "`output_dir`"),
        ({"num_views": "3", "blur_prob": "0.5", "solarize_prob": "0"}, "`num_views`"),
        ({"weight_decay": "0"}, "`weight_decay`"),
        ({"per_device_train_batch_size": "64"}, "`per_device_train_batch_size`"),
        ({"resume_from_checkpoint": "nowhere"}, "`resume_from_checkpoint`"),
        ({"report_to": "nothing"}, "`report_to`"),
        ({"eval_strategy": "steps"}, "`eval_strategy`"),
        ({"eval_on_start": "true"}, "`eval_on_start`"),
    ],
)
def test_an_option_that_does_not_fit_the_rest_of_the_run_is_refused_before_anything_is_written(
    refusal, options, complaint
):
    assert complaint in refusal(**options)


@pytest.mark.parametrize("model", ["nobody/nothing", "resnet999", "resnet18", "./nowhere"])
def test_a_model_that_cannot_be_had_is_refused(refusal, model):
    line = refusal(model=model, from_scratch="false")
    assert line.startswith("`model` must be a Hub id, a timm name or a folder with config.json, got ")
    assert model.removeprefix("./") in line


@pytest.fixture
def checkpoint(tmp_path):
    """Folder of an encoder by timm name, with random weights."""

    def write(name: str) -> Path:
        load_backbone(name, from_scratch=True).model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


def test_a_size_that_the_encoder_cannot_take_is_refused(refusal, checkpoint):
    line = refusal(model=str(checkpoint("vit_tiny_patch16_224")), from_scratch="false", image_size="100")
    assert line.startswith("`image_size` must be a multiple of the patch size 16, got 100")
    assert line.endswith("The nearest: 96 and 112.")


@pytest.mark.parametrize(("other", "name"), [("test_vit", "test_resnet"), ("resnet10t", "resnet14t")])
def test_weights_of_another_architecture_are_refused(refusal, checkpoint, other, name):
    folder = checkpoint(name)
    shutil.copy(checkpoint(other) / "model.safetensors", folder)
    line = refusal(model=str(folder), from_scratch="false")
    assert line.startswith("`model` must hold at least 99% of the ")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "`recipe` must be a YAML file or the name of a shipped recipe, got 'recipe.yaml'. There are: "),
        ("- model\n", "`recipe` must map options to values, got a list"),
        ("model: [", "`recipe` must be a YAML file, got 'recipe.yaml': while parsing"),
        ("num_view: 2\n", "`num_view` is not an option. Did you mean 'num_views'?"),
        ("num_views:\n", "`num_views` must be of type int, got None"),
        ("num_views: 2.7\n", "`num_views` must be of type int, got 2.7"),
        ("regularizer_args: {1: 2}\n", "`regularizer_args` must be of type dict[str, typing.Any], got {1: 2}"),
    ],
)
def test_a_wrong_recipe_is_refused(refusal, workplace, content, complaint):
    if content is not None:
        (workplace / "recipe.yaml").write_text(content)
    assert refusal("recipe.yaml").startswith(complaint)


def test_a_dataset_folder_that_does_not_exist_is_refused(refusal):
    assert refusal(dataset="./photos").startswith(
        "`dataset` must be `digits`, an existing folder or a Hub id, got './p"
    )


def test_a_folder_of_unreadable_images_is_refused(refusal, workplace):
    folder = workplace / "photos" / "train" / "cat"
    folder.mkdir(parents=True)
    for number in range(8):
        (folder / f"{number}.png").write_bytes(b"not an image")
    line = refusal(dataset="photos", max_samples=None)
    assert line.startswith("`dataset` must hold readable images, got one that is not, nor are those")
    assert "image 0 of 'photos' (not an image" in line


def test_a_column_that_is_not_there_is_refused(refusal, workplace):
    folder = workplace / "photos" / "train" / "cat"
    folder.mkdir(parents=True)
    for number in range(8):
        Image.fromarray(np.full((16, 16, 3), number, dtype=np.uint8)).save(folder / f"{number}.png")
    line = refusal(dataset="photos", max_samples=None, image_column="picture")
    assert line.startswith("`image_column` must be a column of images, got 'picture'. Choose from")


def test_a_split_that_is_not_there_is_refused(refusal):
    assert "must name a split of 'digits' (train, test), got 'valid'" in refusal(train_split="valid")


def test_the_folder_of_an_earlier_run_is_not_touched(refusal, workplace):
    (workplace / "out").mkdir()
    (workplace / "out" / "config.json").write_text(json.dumps({"model_type": "e2mc_ssl"}))
    assert refusal().startswith("`output_dir` holds an earlier run, got 'out'. Pass another, or --overwrite.")


def test_an_output_folder_that_is_a_file_is_refused(refusal, workplace):
    (workplace / "out").write_text("a file")
    assert refusal().startswith("`output_dir` must be a folder that can be written, got 'out'")


def test_processes_that_would_train_apart_are_refused(refusal, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refusal(use_cpu="false").startswith("`use_cpu` must be given for several processes on the CPU: 2 processes")


def test_a_refused_run_leaves_the_random_state_alone_until_the_options_are_checked(refusal):
    before = torch.random.get_rng_state()
    refusal(num_views="1")
    assert torch.equal(torch.random.get_rng_state(), before)
