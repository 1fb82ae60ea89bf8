import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from models.author_files import ARCHITECTURE, RESNET, WRITERS, resnet
from models.hostile_files import archive, executing, mapping
from models.tiny import same_state
from transformers import AutoImageProcessor, AutoModel

from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.starting_point import load_starting_point

SCRIPT = Path(__file__).parents[2] / "scripts" / "import_checkpoint.py"
SLOWEST_HELP = 3.0  # seconds
TINY = ["--architecture", ARCHITECTURE, "--backbone_args", *(f"{key}={value}" for key, value in RESNET.items())]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("import_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    return tmp_path


@pytest.fixture
def refusal(script, capsys, workplace):
    """The one line a run ends with; checks the exit code, and that the folder is as it was."""

    def run(*words: str) -> str:
        before = sorted(path for path in workplace.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            script.main(list(words))
        assert caught.value.code == 2
        assert sorted(path for path in workplace.rglob("*")) == before
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("import_checkpoint.py: error: ")

    return run


def test_a_checkpoint_with_heads_becomes_a_folder_that_everyone_loads(script, workplace, capsys):
    model, _ = WRITERS["swav"](workplace / "swav.pth.tar")
    script.main(["swav.pth.tar", "--format", "swav", "--output_dir", "runs/swav", *TINY])
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "swav.pth.tar (swav): resnet18, 100.00% of its numbers; heads projector, prototypes; momentum of 46 "
        "parameters. Go on: python scripts/continue_pretrain.py --model runs/swav --objective swav"
    )
    names = ["config.json", "encoder", "import.json", "model.safetensors", "optimizer.safetensors"]
    assert sorted(path.name for path in Path("runs/swav").iterdir()) == names
    assert sorted(path.name for path in Path("runs").iterdir()) == ["swav"]
    start = load_starting_point("runs/swav")
    assert torch.equal(start.objective.prototypes.weight, model.prototypes.weight)
    images = torch.randn(2, 3, 224, 224)
    features = start.backbone.eval()(images)
    assert torch.allclose(load_backbone("runs/swav/encoder").eval()(images), features, atol=1e-5)
    assert torch.allclose(AutoModel.from_pretrained("runs/swav/encoder")(images).pooler_output, features, atol=1e-5)
    encoder = timm.create_model("local-dir:runs/swav/encoder", pretrained=True).eval()
    assert torch.allclose(encoder(images), features, atol=1e-5)
    assert AutoImageProcessor.from_pretrained("runs/swav/encoder") is not None
    written = [path.read_text() for path in Path("runs/swav").rglob("*.json")]
    assert not any(str(workplace) in text for text in written)


def test_an_encoder_alone_becomes_an_encoder_folder_and_says_that_heads_are_missing(script, workplace, capsys):
    model = resnet()
    torch.save(model.state_dict() | {"fc.weight": torch.ones(10, 16)}, "resnet50.pth")
    script.main(["resnet50.pth", "--format", "vicreg", "--output_dir", "my run", *TINY])
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "resnet50.pth (vicreg): resnet18, 100.00% of its numbers; heads missing: new ones will be fitted; left out "
        "'fc.weight' (see import.json). Go on: python scripts/continue_pretrain.py --model 'my run/encoder' "
        "--objective vicreg"
    )
    assert sorted(path.name for path in Path("my run").iterdir()) == ["encoder", "import.json"]
    assert same_state(load_backbone("my run/encoder").model.timm_model, model)
    record = json.loads(Path("my run/import.json").read_text())
    assert (record["dropped"], record["heads"], record["file"]["name"]) == (["fc.weight"], [], "resnet50.pth")


def test_a_run_goes_on_from_an_import(script, workplace, capsys, monkeypatch):
    WRITERS["vicreg"](workplace / "vicreg.pth")
    script.main(["vicreg.pth", "--output_dir", "start", *TINY])
    path = SCRIPT.with_name("continue_pretrain.py")
    spec = importlib.util.spec_from_file_location("continue_pretrain", path)
    training = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    options = {"model": "start", "image_size": 32, "use_cpu": "true", "max_steps": 1, "max_samples": 16}
    options |= {"per_device_train_batch_size": 8, "output_dir": "out"}
    training.main([f"--{name}={value}" for name, value in options.items()])
    before, after = load_starting_point("start"), load_starting_point("out")
    assert after.config.objective_args == before.config.objective_args == {"projector_dim": 16, "projector_layers": 3}
    assert not same_state(after, before)
    moved = (after.objective.projector[0].weight - before.objective.projector[0].weight).abs().max()
    assert 0 < moved < 0.1


def test_help_answers_at_once_and_describes_every_option(script, tmp_path):
    times, answers = [], []
    for _ in range(2):
        start = time.perf_counter()
        command = [sys.executable, str(SCRIPT), "--help"]
        answers.append(subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout)
        times.append(time.perf_counter() - start)
    assert min(times) < SLOWEST_HELP
    assert max(map(len, answers[0].splitlines())) <= 120
    words = " ".join(answers[0].split())
    for field in dataclasses.fields(script.ImportArguments):
        assert f"--{field.name} " in words
        assert field.metadata["help"] in words


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "name one file before the options"),
        (["a.pth", "b.pth", "--output_dir", "out"], "name one file before the options"),
        (["a.pth"], "`output_dir` must be given"),
        (["a.pth", "--output_dir", "out", "--formt", "swav"], "`formt` is not an option. Did you mean 'format'?"),
        (["a.pth", "--output_dir", "out"], "`file` must be a checkpoint on this machine, got 'a.pth': no such file"),
        (["good.pth", "--output_dir", "out", "--format", "sway"], "`format` 'sway' is unknown. Did you mean 'swav'?"),
        (["good.pth", "--output_dir", "out"], "`architecture` must be given for a file that is no ResNet-18"),
        (["good.pth", "--output_dir", "good.pth", *TINY], "`output_dir` must be a folder"),
        (["good.pth", "--output_dir", "full", *TINY], "`output_dir` must be empty or new, got 'full'"),
        (["good.pth", "--output_dir", "full", "--overwrite", *TINY], "`output_dir` must be an earlier import"),
        (
            ["bad.pth", "--output_dir", "out", *TINY],
            "refers to 'os.system', which is neither a tensor nor a plain value",
        ),
    ],
)
def test_a_wrong_request_is_one_line_with_exit_code_2_and_leaves_nothing(refusal, workplace, words, complaint):
    torch.save(resnet().state_dict(), "good.pth")
    Path("bad.pth").write_bytes(archive(mapping(executing(str(workplace / "canary"))["os.system"])))
    Path("full").mkdir()
    Path("full", "thesis.txt").write_text("of mine")
    assert complaint in refusal(*words)


def test_an_earlier_import_is_replaced_when_asked(script, workplace):
    for number in range(2):
        torch.manual_seed(number)
        torch.save(resnet().state_dict(), "encoder.pth")
        script.main(["encoder.pth", "--output_dir", "out", "--overwrite", *TINY])
    last = torch.load("encoder.pth")
    assert torch.equal(load_backbone("out/encoder").model.timm_model.conv1.weight, last["conv1.weight"])
