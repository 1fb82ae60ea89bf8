"""Evaluate frozen encoders: nearest neighbors and linear probes on shares of the labels.

  python scripts/evaluate.py runs/before/encoder runs/control/encoder runs/after/encoder --dataset ./photos
  python scripts/evaluate.py before=facebook/dinov2-small after=runs/mine/encoder --label_fractions 0.01 1.0

An encoder is a Hub id, a timm name, or a folder; NAME=ENCODER names it in the results. All of them get the same
images and the same draws of labels.
"""

import dataclasses
import sys
from pathlib import Path

# This file has the name of a library: its folder must not be searched for `import evaluate`.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

from e2mc_hf.arguments import DataArguments, EvaluationArguments, require
from e2mc_hf.command_line import Options, build_parser, one_line_errors, read_options, refuse_unknown, take

GROUPS = {"images": DataArguments, "protocol": EvaluationArguments}


def parse(argv: list[str] | None) -> tuple[list[str], Options]:
    """Encoders and options; answers --help before anything heavy is imported."""
    parser = build_parser(__doc__, GROUPS)
    parser.usage = "%(prog)s ENCODER [ENCODER ...] [options]"
    words = sys.argv[1:] if argv is None else argv
    first_flag = next((position for position, word in enumerate(words) if word.startswith("-")), len(words))
    namespace, rest = parser.parse_known_args(words[first_flag:])
    if first_flag == 0:
        parser.error("name at least one encoder before the options, such as runs/mine/encoder")
    return words[:first_flag], read_options(namespace, GROUPS, None, rest)


def run(encoders: list[str], options: Options) -> None:
    """Load the images and every encoder, measure, write, print."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from e2mc_hf.data.dataset import EvaluationDataset
    from e2mc_hf.data.sources import load_images, load_test_images
    from e2mc_hf.data.views import evaluation_transform
    from e2mc_hf.evaluation.protocol import evaluate_encoder
    from e2mc_hf.evaluation.results import DatasetRecord, check_writable, metrics_record, portable, write_metrics
    from e2mc_hf.evaluation.results_table import results_table
    from e2mc_hf.models.loading import load_backbone

    disable_progress_bar()  # those of loading; the features keep theirs
    refuse_unknown(options, list(GROUPS.values()))
    given = dict(options)
    data, protocol = take(options, DataArguments), take(options, EvaluationArguments)
    paths = dict(map(named, encoders))
    names = [portable(name) for name in paths]
    require(len(set(names)) == len(encoders), "encoders", "must differ in name", names, "Name them: NAME=ENCODER.")
    check_writable(protocol.output)
    train, test = load_images(data, data.train_split), load_test_images(data, protocol.test_split)
    backbones = [(name, load_backbone(path)) for name, path in paths.items()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for name, backbone in backbones:
        transform = evaluation_transform(backbone.image_settings)
        datasets = [EvaluationDataset(source, transform) for source in (train, test)]
        results.append(evaluate_encoder(backbone, *datasets, protocol, name=name, device=device))
    dataset = DatasetRecord(train.name, train.split, test.split, data.dataset_config, train.revision)
    record = metrics_record(results, dataset=dataset, arguments=given | dataclasses.asdict(protocol))
    write_metrics(protocol.output, record)
    print(f"{train.name}: {len(train)} training images, {len(test)} test images; accuracy in % ± standard error")
    print(results_table(record))
    print(f"Written to {protocol.output}.")


def named(encoder: str) -> tuple[str, str]:
    """Name and location of NAME=ENCODER; the location names itself."""
    name, separator, path = encoder.partition("=")
    return (name, path) if separator else (encoder, encoder)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with one_line_errors():
        run(*parse(argv))


if __name__ == "__main__":
    main()
