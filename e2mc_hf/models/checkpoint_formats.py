"""How the authors of each method lay out a checkpoint, and where its tensors go in an `SSLModel`.

| format | saved as | encoder | heads |
|---|---|---|---|
| vicreg | model, optimizer (LARS) | backbone. | projector. |
| barlow_twins | model, optimizer (LARS) | backbone. | projector.; the affine-free bn. is not kept |
| swav | the state dict, or state_dict, optimizer (SGD in LARC) | no prefix | projection_head., prototypes. |
| simsiam | state_dict, optimizer (SGD) | encoder. | encoder.fc. is the projector; predictor. |
| mec | state_dict, optimizer (SGD) | encoder. | as simsiam; teacher. holds the averaged encoder, with its fc. |
| dino | student, teacher, optimizer, dino_loss | backbone. | head.mlp. the projector, head.last_layer. prototypes |
| moco | state_dict, optimizer (SGD) | encoder_q. | no objective here: encoder_q.fc., encoder_k. and queue are dropped |

`module.` (DataParallel) and `_orig_mod.` (torch.compile) count as nothing wherever they stand. Every format also comes
as an encoder alone, under any of its prefixes or none; classifiers and whatever else has no place are dropped, by name.

The layouts are those of the repositories facebookresearch/vicreg, barlowtwins, swav, simsiam, dino and moco, and of
xinliu20/MEC, whose model is SimSiam's with a third part: `teacher`, a copy of `encoder` with its `fc`.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from e2mc_hf.errors import UsageError
from e2mc_hf.options import suggestion

_NO_LEVEL = {"module", "_orig_mod"}
_STATE_DICTS = ("state_dict", "model", "model_state_dict", "model_state", "net")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "queue", "queue_ptr", "center")


@dataclass(frozen=True)
class Format:
    """Where the tensors of a format go.

    Attributes:
        name: What the user calls it.
        objective: The objective it has heads for.
        rules: Prefix in the file, prefix of the place; the first that fits counts, and None drops.
        vectors_last: Whether its optimizer lists matrices before vectors, and not parameters as the model has them.
    """

    name: str
    objective: str | None
    rules: tuple[tuple[str, str | None], ...]
    vectors_last: bool = False


_PROJECTOR_AND_BACKBONE = (("projector.", "objective.projector."), ("backbone.", "backbone."))
_SIMSIAM = (
    ("encoder.fc.", "objective.projector."),
    ("encoder.", "backbone."),
    ("predictor.", "objective.predictor."),
)


def _dino_rules(network: str, teacher: str, place: str) -> tuple[tuple[str, str | None], ...]:
    prototypes = f"objective.{teacher}prototypes.weight"
    return (
        (f"{network}.backbone.", place),
        (f"{network}.head.mlp.", f"objective.{teacher}projector."),
        (f"{network}.head.last_layer.weight_v", prototypes),
        (f"{network}.head.last_layer.parametrizations.weight.original1", prototypes),
    )


FORMATS = {
    kind.name: kind
    for kind in (
        Format("vicreg", "vicreg", _PROJECTOR_AND_BACKBONE),
        Format("barlow_twins", "barlow_twins", _PROJECTOR_AND_BACKBONE, vectors_last=True),
        Format(
            "swav",
            "swav",
            (
                ("projection_head.", "objective.projector."),
                ("prototypes.", "objective.prototypes."),
                ("", "backbone."),
            ),
        ),
        Format("simsiam", "simsiam", _SIMSIAM),
        Format("mec", "mec", (*_SIMSIAM, ("teacher.fc.", "objective.teacher_projector."), ("teacher.", "teacher."))),
        Format(
            "dino",
            "dino",
            (
                *_dino_rules("student", "", "backbone."),
                *_dino_rules("teacher", "teacher_", "teacher."),
                ("dino_loss.center", "objective.center"),
            ),
        ),
        Format("moco", None, (("encoder_q.fc.", None), ("encoder_q.", "backbone."))),
    )
}
# The evaluated encoder of DINO is the teacher's.
_ENCODER_RULES = {"dino": (("teacher.backbone.", "backbone."),)}


@dataclass
class Layout:
    """Tensors of a file and their places.

    Attributes:
        format: Name of the format; `encoder` for an encoder alone of no known method.
        tensors: By their names in the file, without levels that count as nothing.
        places: Name in the file -> `backbone.`, `teacher.` or `objective.` and the name there.
        optimizer: State dict of the optimizer, unchecked, or None.
    """

    format: str
    tensors: dict[str, Tensor]
    places: dict[str, str] = field(default_factory=dict)
    optimizer: Any = None

    @property
    def objective(self) -> str | None:
        """Objective that the format has heads for."""
        return FORMATS[self.format].objective if self.format in FORMATS else None

    @property
    def dropped(self) -> list[str]:
        """Names without a place, in the order of the file."""
        return [name for name in self.tensors if name not in self.places]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose places begin with a prefix, by the rest of the place."""
        return {
            place.removeprefix(prefix): self.tensors[name]
            for name, place in self.places.items()
            if place.startswith(prefix)
        }

    def parameters(self) -> list[str]:
        """Names in the order in which the authors' optimizer lists the parameters."""
        names = [name for name in self.tensors if name.split(".")[-1] not in _BUFFERS]
        if self.format in FORMATS and FORMATS[self.format].vectors_last:
            names.sort(key=lambda name: self.tensors[name].dim() == 1)
        return names


def read_layout(content: Any, format: str = "auto", *, encoder_only: bool = False) -> Layout:
    """Sort what a checkpoint holds.

    Args:
        content: What was saved, as `read_checkpoint` gives it.
        format: Name of the format, or `auto` to tell it by the names.
        encoder_only: Leave heads out.

    Returns:
        Layout whose places are empty for an encoder alone: under which prefix it lies, its model decides.

    Raises:
        UsageError: If the format is unknown or another than that of the names, or there is no state dict.
    """
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"`format` {format!r} is unknown. {suggestion(format, [*FORMATS, 'auto'])}")
    tensors, optimizer = _unwrap(content)
    detected = detect_format(tensors)
    name = detected if format == "auto" else format
    if name is None:
        return Layout("encoder", tensors)
    rules = _ENCODER_RULES.get(name, FORMATS[name].rules) if encoder_only else FORMATS[name].rules
    places = _places(tensors, rules)
    if encoder_only:
        places = {key: place for key, place in places.items() if place.startswith("backbone.")}
    if not any(place.startswith("backbone.") for place in places.values()):
        if detected not in (None, name):
            raise UsageError(f"`format` must be that of the file, whose names are {detected}'s, got {name}. Pass auto.")
        places = {}
    return Layout(name, tensors, places, optimizer)


def detect_format(names: Collection[str]) -> str | None:
    """Tell the format by the names of the tensors; None if they are those of an encoder alone."""
    levels = {name.split(".")[0] for name in names}
    if "encoder_q" in levels:
        return "moco"
    if levels & {"projection_head", "prototypes"}:
        return "swav"
    if {"encoder", "predictor"} <= levels:
        return "mec" if "teacher" in levels else "simsiam"
    if {"backbone", "projector"} <= levels:
        return "vicreg" if "projector.0.bias" in names and "bn.running_mean" not in names else "barlow_twins"
    if levels & {"student", "teacher"} and any(name.split(".")[1:2] in (["head"], ["backbone"]) for name in names):
        return "dino"
    return None


def _places(names: Iterable[str], rules: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    places = {}
    for name in names:
        prefix, place = next((rule for rule in rules if name.startswith(rule[0])), ("", None))
        if place is not None:
            places[name] = place + name.removeprefix(prefix)
    return places


def _unwrap(content: Any) -> tuple[dict[str, Tensor], Any]:
    """Find the state dict, or those of student and teacher, and the optimizer's."""
    if not isinstance(content, Mapping):
        raise _no_state_dict(f"a {type(content).__name__}")
    networks = {name: content[name] for name in ("student", "teacher") if _is_state_dict(content.get(name))}
    if networks:
        loss = {"dino_loss": content["dino_loss"]} if _is_state_dict(content.get("dino_loss")) else {}
        flat = {f"{name}.{key}": value for name, state in (networks | loss).items() for key, value in state.items()}
        return _plain(flat), content.get("optimizer")
    found = [name for name in _STATE_DICTS if _is_state_dict(content.get(name))]
    if not found and _is_state_dict(content):
        return _plain(content), None
    if not found:
        found = [name for name, value in content.items() if name != "optimizer" and _is_state_dict(value)]
    if len(found) != 1:
        raise _no_state_dict(f"{len(found)} under {[str(name)[:40] for name in list(content)[:8]]}")
    return _plain(content[found[0]]), content.get("optimizer")


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and any(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
        and all(isinstance(key, str) for key in value)
    )


def _no_state_dict(got: str) -> UsageError:
    return UsageError(
        f"`file` must hold one state dict, by itself or under one of {', '.join(_STATE_DICTS)}, student and teacher, "
        f"got {got}. Save the state dict alone."
    )


def _plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        name = ".".join(part for part in key.split(".") if part not in _NO_LEVEL)
        if isinstance(value, Tensor):
            if name in plain:
                raise UsageError(
                    f"`file` must hold each tensor once, got {name[:80]!r} twice, with and without `module.` or "
                    "`_orig_mod.`. Save the state dict of one of the two models."
                )
            plain[name] = value.detach()
    return plain
