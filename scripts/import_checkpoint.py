"""Turn a checkpoint of a method's authors into a folder that continue_pretrain.py starts from.

  python scripts/import_checkpoint.py resnet50_fullckpt.pth --format vicreg --output_dir runs/vicreg
  python scripts/import_checkpoint.py dino_deitsmall16_pretrain.pth --output_dir runs/dino

FILE is a .pth, .pt or .safetensors file. It may come from anywhere: nothing in it is executed. The folder gets
encoder/ (for transformers and timm), import.json (SHA-256, what came from where, what was left out) and, where the file
has the heads, config.json and model.safetensors, and optimizer.safetensors with the momentum.
"""

import dataclasses
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2mc_hf.arguments import option, require
from e2mc_hf.command_line import Options, build_parser, one_line_errors, read_options, refuse_unknown, take

if TYPE_CHECKING:
    from e2mc_hf.models.checkpoint_import import ImportedCheckpoint


@dataclasses.dataclass
class ImportArguments:
    """What the file is, and where the folder goes."""

    format: str = option(
        "auto",
        "Layout of the file: vicreg, swav, simsiam, mec, dino, moco, barlow_twins, or auto to tell by its names.",
    )
    architecture: str | None = option(
        None, "timm name of the encoder; found by its shapes when not given (ResNet-18 to -152, ViT-Ti to -L)."
    )
    backbone_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"help": "Arguments of the timm architecture, key=value (img_size=96)."}
    )
    encoder_only: bool = option(False, "Leave heads and momentum out.")
    output_dir: str | None = option(None, "Folder to write.")
    overwrite: bool = option(False, "Replace the folder of an earlier import.")


GROUPS = {"import": ImportArguments}


def parse(argv: list[str] | None) -> tuple[str, Options]:
    """File and options; answers --help before anything heavy is imported."""
    parser = build_parser(__doc__, GROUPS)
    parser.usage = "%(prog)s FILE --output_dir FOLDER [options]"
    words = sys.argv[1:] if argv is None else argv
    first_flag = next((position for position, word in enumerate(words) if word.startswith("-")), len(words))
    namespace, rest = parser.parse_known_args(words[first_flag:])
    if first_flag != 1:
        parser.error("name one file before the options, such as resnet50_fullckpt.pth")
    return words[0], read_options(namespace, GROUPS, None, rest)


def run(file: str, options: Options) -> None:
    """Read the file, then write the folder: whole, or not at all."""
    refuse_unknown(options, list(GROUPS.values()))
    arguments = take(options, ImportArguments)
    require(arguments.output_dir is not None, "output_dir", "must be given", None, "Pass --output_dir runs/mine.")
    output_dir = Path(str(arguments.output_dir))
    check_output(output_dir, overwrite=arguments.overwrite)

    from transformers.utils.logging import disable_progress_bar

    from e2mc_hf.models.checkpoint_import import import_checkpoint
    from e2mc_hf.publishing.encoder import export_encoder

    disable_progress_bar()
    imported = import_checkpoint(
        file,
        format=arguments.format,
        architecture=arguments.architecture,
        backbone_args=arguments.backbone_args,
        encoder_only=arguments.encoder_only,
    )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as scratch:
        written = Path(scratch) / "import"
        imported.save(written)
        export_encoder(imported.backbone, written / "encoder")
        if output_dir.exists():
            shutil.rmtree(output_dir)
        written.rename(output_dir)
    print(summary(imported, output_dir))


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder with anything in it that is not to be replaced."""
    require(not folder.is_file(), "output_dir", "must be a folder", str(folder), "Pass another.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    require(overwrite, "output_dir", "must be empty or new", str(folder), "Pass another, or --overwrite.")
    is_import = (folder / "import.json").is_file() and not (folder / "log.json").exists()
    require(is_import, "output_dir", "must be an earlier import to be replaced", str(folder), "Pass another.")


def summary(imported: "ImportedCheckpoint", folder: Path) -> str:
    """One line: what was imported, how much of it, and how to go on."""
    record = imported.record
    parts = [f"{record.file.name} ({record.format}): {record.architecture}, {record.coverage:.2%} of its numbers"]
    if imported.model is not None:
        momentum = f"of {record.num_momentum} parameters" if record.num_momentum else f"none ({record.momentum_note})"
        parts += [f"heads {', '.join(record.heads)}", f"momentum {momentum}"]
    else:
        parts.append("heads missing: new ones will be fitted")
    if record.dropped:
        more = f" and {len(record.dropped) - 1} more" if len(record.dropped) > 1 else ""
        parts.append(f"left out {record.dropped[0][:80]!r}{more} (see import.json)")
    start = folder if imported.model is not None else folder / "encoder"
    objective = f" --objective {record.objective}" if record.objective else ""
    return (
        f"{'; '.join(parts)}. Go on: python scripts/continue_pretrain.py --model {shlex.quote(str(start))}{objective}"
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with one_line_errors():
        run(*parse(argv))


if __name__ == "__main__":
    main()
