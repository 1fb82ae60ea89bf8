"""An author's file becomes a run: import, continue with the recipe of its method, export."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from models.author_files import ARCHITECTURE, RESNET, VIT, VIT_ARCHITECTURE, WRITERS
from models.tiny import same_state

from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel

SCRIPTS = Path(__file__).parents[2] / "scripts"
RECIPES = {"vicreg": "vicreg-1000-e2mc", "swav": "swav-800-e2mc", "simsiam": "simsiam-100-e2mc", "mec": "mec-100-e2mc"}
TINY_RUN = ["--dataset", "digits", "--max_samples", "32", "--image_size", "32", "--per_device_train_batch_size", "16"]
TINY_RUN += [
    "--max_steps",
    "1",
    "--logging_steps",
    "1",
    "--dataloader_num_workers",
    "0",
    "--use_cpu",
    "--disable_tqdm",
    "true",
]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imported(method: str, folder: Path) -> Path:
    WRITERS[method](folder / "author.pth")
    name, options = (VIT_ARCHITECTURE, VIT) if method == "dino" else (ARCHITECTURE, RESNET)
    arguments = ["--architecture", name, "--backbone_args", *(f"{key}={value}" for key, value in options.items())]
    target = str(folder / "imported")
    script("import_checkpoint").main(
        [str(folder / "author.pth"), "--format", method, "--output_dir", target, *arguments]
    )
    return folder / "imported"


@pytest.mark.parametrize("method", sorted(RECIPES))
def test_an_authors_file_is_continued_with_its_heads_by_the_recipe_of_the_paper(tmp_path: Path, method: str) -> None:
    start = imported(method, tmp_path)
    before = SSLModel.from_pretrained(start)
    sizes = {"swav": ["--small_image_size", "32"]}.get(method, [])
    own = {"swav": ["--objective_args", "queue_length=32", "num_prototypes=20", "hidden_dim=24", "projector_dim=16"]}
    arguments = own.get(method, ["--objective_args"])
    continue_pretrain = script("continue_pretrain")
    words = [RECIPES[method], "--model", str(start), "--output_dir", str(tmp_path / "run")]
    continue_pretrain.run(continue_pretrain.parse([*words, *TINY_RUN, *sizes, *arguments]))
    after = SSLModel.from_pretrained(tmp_path / "run")
    assert after.config.objective == method
    assert not torch.equal(after.objective.projector[0].weight, before.objective.projector[0].weight)
    (log, _) = json.loads((tmp_path / "run" / "log.json").read_text())
    assert "marginal_entropy" in log
    assert same_state(load_backbone(str(tmp_path / "run" / "encoder")), after.backbone)


def test_the_momentum_of_the_file_drives_the_first_step(tmp_path: Path) -> None:
    start = imported("vicreg", tmp_path)
    runs = {}
    for restore in ("true", "false"):
        continue_pretrain = script("continue_pretrain")
        words = ["vicreg-1000-e2mc", "--model", str(start), "--output_dir", str(tmp_path / restore), "--objective_args"]
        continue_pretrain.run(continue_pretrain.parse([*words, *TINY_RUN, "--restore_momentum", restore]))
        runs[restore] = SSLModel.from_pretrained(tmp_path / restore)
    difference = runs["true"].objective.projector[1].bias - runs["false"].objective.projector[1].bias
    from safetensors.torch import load_file

    momentum = load_file(start / "optimizer.safetensors")["objective.projector.1.bias"]
    assert torch.allclose(difference, -0.003 * 0.9 * momentum, rtol=1e-3, atol=1e-7)
