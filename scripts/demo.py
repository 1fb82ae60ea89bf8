"""The whole loop on the embedded digits: pretrain, continue with E2MC and as control, export, evaluate, compare.

  python scripts/demo.py --output_dir demo

Further flags go to every training, such as --max_steps 1 --logging_steps 1 for a rehearsal.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "model_cards"
ARMS = {"control": ["--regularizer", "none", "--regularizer_args"], "e2mc": []}
INTRODUCTION = (
    "A small ResNet was pretrained with VICReg on the digits (before). From the same weights, heads included, it was "
    "continued twice for the same epochs: with VICReg alone (control) and with VICReg and E2MC (e2mc)."
)


def script(name: str, *words: str) -> None:
    """Show and run one of the scripts, as a user would."""
    print(f"\n$ python scripts/{name} {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / "scripts" / name), *words], check=True)


def train(recipe: str, output_dir: Path, flags: list[str]) -> None:
    """Run continue_pretrain.py on the CPU."""
    recipe_path = str(RECIPES / recipe / "recipe.yaml")
    script("continue_pretrain.py", recipe_path, "--output_dir", str(output_dir), "--overwrite", "--use_cpu", *flags)


def report(folder: Path) -> None:
    """Write report.html from the logs, the metrics and the embeddings of the test images."""
    import torch

    from e2mc_hf.arguments import DataArguments
    from e2mc_hf.data.dataset import EvaluationDataset
    from e2mc_hf.data.sources import load_test_images
    from e2mc_hf.data.views import evaluation_transform
    from e2mc_hf.evaluation.features import extract_features
    from e2mc_hf.evaluation.report import write_report
    from e2mc_hf.evaluation.results import read_metrics
    from e2mc_hf.models.projected import Projected
    from e2mc_hf.models.ssl_model import SSLModel

    images = load_test_images(DataArguments(), None)
    cubes = {}
    for name in ("before", *ARMS):
        model = SSLModel.from_pretrained(folder / name)
        dataset = EvaluationDataset(images, evaluation_transform(model.backbone.image_settings))
        embeddings = extract_features(Projected(model), dataset, batch_size=64).x
        cubes[name] = torch.from_numpy(embeddings).sigmoid().numpy()
    write_report(
        folder / "report.html",
        title="VICReg continued with E2MC on the digits",
        introduction=INTRODUCTION,
        record=read_metrics(folder / "metrics.json"),
        logs={name: json.loads((folder / name / "log.json").read_text()) for name in ARMS},
        unit_embeddings=cubes,
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", default="demo", help="Folder for everything the demo makes. [demo]")
    options, further = parser.parse_known_args()
    folder = Path(options.output_dir)
    start = time.monotonic()
    try:
        train("digits_vicreg", folder / "before", further)
        for arm, flags in ARMS.items():
            train("digits_vicreg_e2mc", folder / arm, ["--model", str(folder / "before"), *flags, *further])
        encoders = [f"{name}={folder / name / 'encoder'}" for name in ("before", *ARMS)]
        script("evaluate.py", *encoders, "--output", str(folder / "metrics.json"))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    report(folder)
    print(f"\nReport: {folder / 'report.html'}. The demo took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
