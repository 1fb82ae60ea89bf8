"""Turn an author's checkpoint into a backbone, and into an `SSLModel` where it has the heads."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.checkpoint_encoder import build_backbone, check_coverage, copy_tensors, is_timm, place_encoder
from e2mc_hf.models.checkpoint_files import FileRecord, read_checkpoint
from e2mc_hf.models.checkpoint_formats import Layout, read_layout
from e2mc_hf.models.checkpoint_heads import check_whole, heads_of, options_of
from e2mc_hf.models.checkpoint_momentum import momentum_of
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.objectives.registry import OBJECTIVES

MOMENTUM_FILE, RECORD_FILE = "optimizer.safetensors", "import.json"


@dataclass(frozen=True)
class ImportRecord:
    """What came from where; written as `import.json`.

    Attributes:
        file: Name, size and SHA-256 of the file.
        format: Layout of the file; `encoder` for an encoder alone of no known method.
        architecture: timm name or kind of the backbone.
        objective: The method, if there is an objective for it.
        objective_args: Options that the shapes of the heads imply.
        coverage: Share of the backbone's numbers that came from the file.
        missing: Names of the backbone's tensors that did not.
        heads: Heads that were restored; empty when the file has none, or there is no objective for them.
        num_momentum: Parameters whose momentum was restored.
        momentum_note: Why there is none.
        dropped: Names in the file that had no place.
        fingerprint: SHA-256 of the backbone's tensors.
    """

    file: FileRecord
    format: str
    architecture: str
    objective: str | None
    objective_args: dict[str, Any]
    coverage: float
    missing: list[str]
    heads: list[str]
    num_momentum: int
    momentum_note: str
    dropped: list[str]
    fingerprint: str


@dataclass(eq=False)
class ImportedCheckpoint:
    """A checkpoint in this package's terms.

    Attributes:
        backbone: The encoder.
        model: The encoder with the file's heads, or None when it is an encoder alone.
        momentum: Momentum buffers by the names of `model`'s parameters, in float32.
        record: What came from where.
    """

    backbone: Backbone
    model: SSLModel | None
    record: ImportRecord
    momentum: dict[str, Tensor] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write `import.json` and, with heads, the folder of an `SSLModel` and `optimizer.safetensors`.

        The latter holds one tensor for each parameter with momentum, under the parameter's name: the running sum that
        torch's SGD and timm's Lars call `momentum_buffer`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD_FILE).write_text(json.dumps(asdict(self.record), indent=1) + "\n", encoding="utf-8")
        if self.model is not None:
            self.model.save_pretrained(folder)
        if self.momentum:
            buffers = {name: buffer.contiguous() for name, buffer in self.momentum.items()}
            save_file(buffers, folder / MOMENTUM_FILE, metadata={"format": "pt"})


def import_checkpoint(
    path: str | Path,
    *,
    format: str = "auto",
    architecture: str | None = None,
    backbone: Backbone | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    encoder_only: bool = False,
) -> ImportedCheckpoint:
    """Load an author's `.pth` file, or safetensors of that layout, with what it has of heads and momentum.

    At least 99% of the backbone's numbers must be in the file, each in its shape. Heads come whole or not at all.

    Args:
        path: The file; it may be hostile, see `read_checkpoint`.
        format: `vicreg`, `swav`, `simsiam`, `mec`, `dino`, `moco`, `barlow_twins`, or `auto` to tell by the names.
        architecture: timm name, or a folder with a configuration; recognized by the shapes when not given (ResNet-18 to
            -152, ViT-Ti to -L of DINO).
        backbone: Takes the numbers, in place of `architecture`.
        backbone_args: Arguments of the timm architecture.
        encoder_only: Leave heads out.

    Raises:
        UsageError: If the file is refused, its architecture is not recognized, less than 99% of the backbone is in it,
            a shape differs, a number is not finite, or heads are there in part.
    """
    content, file = read_checkpoint(path)
    layout = read_layout(content, format, encoder_only=encoder_only)
    if backbone is None:
        backbone = build_backbone(layout, architecture, dict(backbone_args or {}), file.name)
    elif architecture is not None or backbone_args:
        raise UsageError("`backbone` must not be given with `architecture` or `backbone_args`. Drop one of them.")
    plain = backbone.model.get_submodule("timm_model") if is_timm(backbone) else backbone.model
    place_encoder(layout, plain)
    before = _fingerprint(plain)
    missing, coverage = check_coverage(plain, layout, file.name)
    copy_tensors(plain.state_dict(), layout.part("backbone."))
    fingerprint = _fingerprint(plain)
    if fingerprint == before:
        raise UsageError(f"`file` must change the encoder, got {file.name!r} with its initial numbers. Pass another.")
    model, options = (None, {}) if encoder_only else _add_heads(backbone, layout)
    momentum, note = momentum_of(layout) if model is not None else ({}, "an encoder alone keeps none")
    momentum = _of_model(model, layout, momentum) if model is not None else {}
    heads = sorted({place.split(".")[1] for place in layout.places.values() if place.startswith("objective.")})
    record = ImportRecord(
        file=file,
        format=layout.format,
        architecture=getattr(backbone.model.config, "architecture", None) or str(backbone.model.config.model_type),
        objective=layout.objective,
        objective_args=options,
        coverage=coverage,
        missing=missing,
        heads=heads if model is not None else [],
        num_momentum=len(momentum),
        momentum_note=note,
        dropped=layout.dropped,
        fingerprint=fingerprint,
    )
    return ImportedCheckpoint(backbone, model, record, momentum)


def _add_heads(backbone: Backbone, layout: Layout) -> tuple[SSLModel | None, dict[str, Any]]:
    """Build the model whose heads the file has, and fill them; None if the file or this package has none."""
    heads = heads_of(layout)
    if not heads or layout.objective not in OBJECTIVES:
        layout.places = {name: place for name, place in layout.places.items() if place.startswith("backbone.")}
        return None, {}
    options = options_of(layout.objective, heads, backbone.measure_num_features(backbone.image_settings.size))
    model = SSLModel.from_backbone(backbone, layout.objective, options)
    state = model.objective.state_dict()
    parts = {name.split(".")[0] for name, _ in model.objective.named_children()}
    counts = [name for name in state if name.endswith("num_batches_tracked")]  # older files of torch have none
    wanted = {name for name in state if name.split(".")[0] in parts} - (set(counts) - set(heads))
    check_whole(sorted(wanted), {name: tensor for name, tensor in heads.items() if name.split(".")[0] in parts})
    copy_tensors(state, heads, "objective.")
    if model.teacher is not None:
        prefix = "model.timm_model." if is_timm(backbone) else "model."
        state = {name.removeprefix(prefix): tensor for name, tensor in model.teacher.state_dict().items()}
        given = layout.part("teacher.")
        missing = [name for name in layout.part("backbone.") if name not in given]
        check_whole(
            [f"teacher.{name}" for name in [*given, *missing]], {f"teacher.{name}": t for name, t in given.items()}
        )
        copy_tensors(state, given, "teacher.")
    return model, options


def _of_model(model: SSLModel, layout: Layout, momentum: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Momentum by the names of the model's trainable parameters."""
    inner = "model.timm_model." if is_timm(model.backbone) else "model."
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = {
        layout.places[name].replace("backbone.", f"backbone.{inner}", 1): buffer
        for name, buffer in momentum.items()
        if name in layout.places
    }
    return {name: buffer for name, buffer in named.items() if name in trainable}


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
