import re

import pytest
import timm
import torch
from models.author_files import DIM, HIDDEN, PROTOTYPES, WIDTH, WRITERS, prefixed, resnet, simsiam, swav, vicreg
from torch import nn

from e2mc_hf.errors import UsageError
from e2mc_hf.models.checkpoint_files import read_checkpoint
from e2mc_hf.models.checkpoint_formats import FORMATS, detect_format, read_layout
from e2mc_hf.models.checkpoint_heads import heads_of, options_of
from e2mc_hf.models.checkpoint_momentum import momentum_of
from e2mc_hf.models.torchvision_names import Architecture, encoder_prefixes, infer_architecture


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Path and author's model and optimizer of each format."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("authors")
    return {name: (folder / f"{name}.pth", *write(folder / f"{name}.pth")) for name, write in WRITERS.items()}


def layout_of(files, name, **options):
    return read_layout(read_checkpoint(files[name][0])[0], **options)


PLACES = {
    "vicreg": {
        "backbone.conv1.weight": "backbone.conv1.weight",
        "backbone.layer2.0.downsample.1.running_var": "backbone.layer2.0.downsample.1.running_var",
        "projector.6.weight": "objective.projector.6.weight",
    },
    "barlow_twins": {"projector.4.running_mean": "objective.projector.4.running_mean", "bn.running_mean": None},
    "swav": {
        "conv1.weight": "backbone.conv1.weight",
        "projection_head.3.bias": "objective.projector.3.bias",
        "prototypes.weight": "objective.prototypes.weight",
    },
    "simsiam": {
        "encoder.layer1.0.bn2.bias": "backbone.layer1.0.bn2.bias",
        "encoder.fc.7.running_mean": "objective.projector.7.running_mean",
        "predictor.3.bias": "objective.predictor.3.bias",
    },
    "mec": {
        "encoder.fc.0.weight": "objective.projector.0.weight",
        "teacher.conv1.weight": "teacher.conv1.weight",
        "teacher.fc.0.weight": "objective.teacher_projector.0.weight",
    },
    "dino": {
        "student.backbone.cls_token": "backbone.cls_token",
        "student.head.mlp.4.bias": "objective.projector.4.bias",
        "student.head.last_layer.weight_v": "objective.prototypes.weight",
        "student.head.last_layer.weight_g": None,
        "teacher.backbone.blocks.1.attn.qkv.bias": "teacher.blocks.1.attn.qkv.bias",
        "teacher.head.mlp.0.weight": "objective.teacher_projector.0.weight",
        "teacher.head.last_layer.weight_v": "objective.teacher_prototypes.weight",
        "dino_loss.center": "objective.center",
    },
    "moco": {
        "encoder_q.conv1.weight": "backbone.conv1.weight",
        "encoder_q.fc.0.weight": None,
        "encoder_k.conv1.weight": None,
        "queue": None,
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_told_by_its_names_and_sorted_into_its_places(files, name):
    layout = layout_of(files, name)
    assert layout.format == name
    assert {key: layout.places.get(key) for key in PLACES[name]} == PLACES[name]
    assert sorted([*layout.places, *layout.dropped]) == sorted(layout.tensors)
    assert len(set(layout.places.values())) == len(layout.places)


def test_every_format_has_a_place_in_the_tests():
    assert PLACES.keys() == FORMATS.keys() == WRITERS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_without_heads_the_encoder_alone_has_places(files, name):
    layout = layout_of(files, name, encoder_only=True)
    assert {place.split(".")[0] for place in layout.places.values()} == {"backbone"}
    author = files[name][1]
    if name == "dino":
        encoder = author["teacher"].backbone
    else:
        encoder = author.get_submodule({"swav": "", "moco": "encoder_q"}.get(name, layout_prefix(name)))
    placed = layout.part("backbone.")
    assert all(torch.equal(placed[key], tensor) for key, tensor in encoder.state_dict().items() if key in placed)
    first = "cls_token" if name == "dino" else "conv1.weight"
    assert first in placed


def layout_prefix(name):
    """Name of the encoder in the author's model."""
    return "encoder" if name in ("simsiam", "mec") else "backbone"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_levels_of_wrappers_count_as_nothing(prefix):
    layout = read_layout({"model": prefixed(vicreg(), prefix)})
    assert layout.format == "vicreg"
    assert "backbone.conv1.weight" in layout.tensors


def test_a_wrapped_backbone_inside_the_model_counts_as_nothing_too():
    state = {name.replace("backbone.", "backbone._orig_mod."): value for name, value in vicreg().state_dict().items()}
    assert "backbone.conv1.weight" in read_layout(state).tensors


def test_a_tensor_that_is_there_with_and_without_a_wrapper_is_refused():
    state = prefixed(resnet()) | {"conv1.weight": torch.zeros(1)}
    with pytest.raises(UsageError, match=r"must hold each tensor once, got 'conv1\.weight' twice"):
        read_layout(state)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "weights"])
def test_the_state_dict_is_found_under_any_name_beside_other_things(key):
    state = resnet().state_dict()
    content = {"epoch": 3, key: state, "optimizer": {"state": {}, "param_groups": []}, "best_acc1": 3.0}
    assert read_layout(content).tensors.keys() == state.keys()
    if key == "state_dict":
        assert read_layout(content | {"best_acc1": torch.tensor(70.0)}).tensors.keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        ({}, "0 under"),
        ({"epoch": 3, "loss": 0.5}, r"0 under \['epoch', 'loss'\]"),
        ({"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}}, "2 under"),
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, r"2 under \['a', 'b'\]"),
    ],
)
def test_what_holds_no_or_two_state_dicts_is_refused(content, got):
    with pytest.raises(UsageError, match=f"must hold one state dict, .* got {got}"):
        read_layout(content)


def test_an_unknown_format_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"`format` 'vicregg' is unknown\. Did you mean 'vicreg'\?"):
        read_layout({"w": torch.ones(1)}, "vicregg")


@pytest.mark.parametrize("model", [resnet, lambda: nn.Sequential(nn.Linear(2, 2))])
def test_an_encoder_alone_is_of_no_format(model):
    assert detect_format(model().state_dict()) is None


def test_prefixes_are_those_that_authors_use():
    names = ["teacher.backbone.conv1.weight", "student.backbone.conv1.weight", "layer1.0.conv1.weight", "encoder.3.w"]
    assert encoder_prefixes(names) == [
        "",
        "encoder.",
        "teacher.",
        "teacher.backbone.",
        "student.",
        "student.backbone.",
    ]


def test_names_of_endless_depth_cost_nothing():
    names = ["encoder." * 100_000 + "weight", *(f"{a}.{b}.{c}.w" for a in LEVELS for b in LEVELS for c in LEVELS)]
    assert len(encoder_prefixes(names)) == 32
    assert max(map(len, encoder_prefixes(names))) < 40


LEVELS = ("backbone", "encoder", "encoder_q", "student", "teacher")


def shapes_of(name, **options):
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in timm.create_model(name, **options).state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
@pytest.mark.parametrize("num_classes", [0, 1000])
def test_a_resnet_is_recognized_by_its_shapes(name, num_classes):
    assert infer_architecture(shapes_of(name, num_classes=num_classes)) == Architecture(name)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 224),
        ("vit_small_patch16_224", 224),
        ("vit_small_patch16_224", 96),
        ("vit_small_patch8_224", 224),
        ("vit_base_patch16_224", 224),
        ("vit_small_patch14_dinov2", 518),
    ],
)
def test_a_vision_transformer_is_recognized_with_the_size_of_its_images(name, size):
    found = infer_architecture(shapes_of(name, num_classes=0, img_size=size) | {"mask_token": (1, 384)})
    assert found == Architecture(name, {"img_size": size, "dynamic_img_size": True})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet26", {}),
        ("resnext50_32x4d", {}),
        ("wide_resnet50_2", {}),
        ("resnet50d", {}),
        ("seresnet50", {"layers": [3, 4, 6, 4]}),
        ("vit_small_patch32_224", {"depth": 6}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("convnext_atto", {}),
        ("test_resnet", {}),
    ],
)
def test_any_other_architecture_is_not_taken_for_one_of_these(name, options):
    assert infer_architecture(shapes_of(name, num_classes=0, **options)) is None


OPTIONS = {
    "vicreg": {"projector_dim": DIM, "projector_layers": 3},
    "barlow_twins": {"projector_dim": DIM, "projector_layers": 3},
    "swav": {"projector_dim": DIM, "hidden_dim": HIDDEN, "num_prototypes": PROTOTYPES},
    "simsiam": {"projector_dim": DIM, "predictor_dim": 8},
    "mec": {"projector_dim": DIM, "predictor_dim": 8},
    "dino": {"projector_dim": DIM, "hidden_dim": HIDDEN, "num_prototypes": PROTOTYPES, "norm": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_of_an_objective_follow_from_the_shapes_of_its_heads(files, name):
    width = 32 if name == "dino" else WIDTH
    assert options_of(name, heads_of(layout_of(files, name)), width) == OPTIONS[name]


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("objective", ["vicreg", "barlow_twins"])
def test_a_projector_of_any_depth_is_counted(depth, objective):
    heads = {f"projector.{3 * layer}.weight": torch.ones(8, 8) for layer in range(depth)}
    assert options_of(objective, heads, 8) == {"projector_dim": 8, "projector_layers": depth}


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("vicreg", ("projector.0.weight", torch.ones(DIM, 9)), "of shape (16, 9), where it takes 16"),
        ("vicreg", ("projector.3.weight", torch.ones(9, DIM)), "of shape (16, 16), where it takes 9"),
        ("vicreg", ("projector.6.weight", torch.ones(9, DIM)), "a projector of widths [16, 16, 9]"),
        ("swav", ("prototypes.weight", None), "without prototypes.weight"),
        ("swav", ("prototypes.weight", torch.ones(9, 9)), "prototypes.weight of shape (9, 9), where it takes 16"),
        ("swav", ("projection_head.0.weight", torch.ones(9)), "projector.0.weight of shape (9,)"),
        ("simsiam", ("predictor.0.weight", None), "without predictor.0.weight"),
        ("simsiam", ("predictor.3.weight", torch.ones(9, 8)), "heads of widths [16, 16, 16, 8, 9]"),
        ("mec", ("encoder.fc.3.weight", None), "without projector.3.weight"),
        ("dino", ("student.head.mlp.2.weight", None), "without projector.2.weight"),
        ("vicreg", ("projector.6.weight", None), "without projector.6.weight"),
        ("dino", ("student.head.last_layer.weight_v", None), "without prototypes.weight"),
        ("dino", ("student.head.last_layer.weight_g", torch.full((PROTOTYPES, 1), 2.0)), "prototypes of unit norm"),
    ],
)
def test_heads_that_the_objective_cannot_have_are_refused(files, name, change, complaint):
    layout = layout_of(files, name)
    key, value = change
    if value is None:
        del layout.places[key]
    else:
        layout.tensors[key] = value
    with pytest.raises(UsageError, match=re.escape(complaint)) as refusal:
        options_of(name, heads_of(layout), 32 if name == "dino" else WIDTH)
    assert "Pass --encoder_only" in str(refusal.value)


def test_the_bias_before_the_last_normalization_of_simsiam_moves_into_its_mean(files):
    author = files["simsiam"][1].eval()
    heads = heads_of(layout_of(files, "simsiam"))
    layers = [nn.Linear(DIM, DIM, bias=False), nn.BatchNorm1d(DIM, affine=False)]
    last = nn.Sequential(*layers).eval()
    last.load_state_dict(
        {f"{i - 6}.{k}": heads[f"projector.{i}.{k}"] for i, k in [(6, "weight"), (7, "running_mean")]}
        | {"1.running_var": heads["projector.7.running_var"], "1.num_batches_tracked": torch.tensor(1)}
    )
    x = torch.randn(5, DIM)
    assert author.encoder.fc[6].bias.abs().min() > 0
    assert torch.allclose(last(x), author.encoder.fc[6:](x), atol=1e-5)


def test_heads_of_dino_are_read_under_the_names_of_newer_torch(files):
    layout = layout_of(files, "dino")
    renamed = {
        name.replace("weight_v", "parametrizations.weight.original1").replace(
            "weight_g", "parametrizations.weight.original0"
        ): tensor
        for name, tensor in layout.tensors.items()
    }
    networks = {network: {} for network in ("student", "teacher")}
    for name, tensor in renamed.items():
        network, _, key = name.partition(".")
        if network in networks:
            networks[network][key] = tensor
    newer = heads_of(read_layout(networks))
    older = heads_of(layout)
    assert newer.keys() == older.keys() - {"center"}
    assert all(torch.equal(newer[name], older[name]) for name in newer)


@pytest.mark.parametrize("name", ["vicreg", "barlow_twins", "swav", "simsiam", "mec", "moco"])
def test_momentum_belongs_to_the_parameter_that_the_author_gave_it(files, name):
    _, model, optimizer = files[name]
    momentum, note = momentum_of(layout_of(files, name))
    key = "mu" if name in ("vicreg", "barlow_twins") else "momentum_buffer"
    wanted = {
        own: optimizer.state[parameter][key]
        for own, parameter in model.named_parameters()
        if optimizer.state[parameter]
    }
    assert note == ""
    assert momentum.keys() == wanted.keys()
    assert all(torch.equal(momentum[own], wanted[own]) for own in wanted)
    assert len({tuple(buffer.flatten()[:3].tolist()) for buffer in wanted.values()}) == len(wanted)


def sgd(parameters, **group):
    state = {number: {"momentum_buffer": torch.randn_like(p)} for number, p in enumerate(parameters)}
    return {"state": state, "param_groups": [{"params": list(range(len(parameters))), **group}]}


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda optimizer: None, "the file has no optimizer"),
        (lambda optimizer: {"state": {}}, "has no parameter groups"),
        (lambda optimizer: [1, 2], "has no parameter groups"),
        (lambda optimizer: optimizer | {"param_groups": [{"params": [[1]]}]}, "has no parameter groups"),
        (lambda optimizer: optimizer | {"state": {0: {"exp_avg": torch.ones(2)}}}, "no momentum of SGD or LARS"),
        (
            lambda optimizer: optimizer | {"param_groups": [{"params": [0, 1]}]},
            "counts 2 parameters where the model has",
        ),
        (
            lambda optimizer: optimizer | {"param_groups": [{"params": optimizer["param_groups"][0]["params"][::-1]}]},
            "lists the parameters in another order",
        ),
    ],
)
def test_momentum_that_cannot_be_told_apart_is_left_out_and_the_reason_said(change, note):
    model = swav()
    optimizer = sgd(list(model.parameters()))
    good = read_layout({"state_dict": model.state_dict(), "optimizer": optimizer})
    assert momentum_of(good)[1] == ""
    changed = read_layout({"state_dict": model.state_dict(), "optimizer": change(optimizer)})
    momentum, said = momentum_of(changed)
    assert momentum == {}
    assert note in said


def test_parameters_numbered_by_older_versions_of_torch_are_told_by_their_order():
    model = simsiam()
    parameters = list(model.parameters())
    numbers = [140_000_000_000_000 + 64 * number for number in range(len(parameters))]
    buffers = [torch.randn_like(parameter) for parameter in parameters]
    optimizer = {
        "state": {number: {"momentum_buffer": buffer} for number, buffer in zip(numbers, buffers, strict=True)},
        "param_groups": [{"params": numbers}],
    }
    momentum, _ = momentum_of(read_layout({"state_dict": prefixed(model), "optimizer": optimizer}))
    assert list(momentum) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(own, buffer) for own, buffer in zip(momentum.values(), buffers, strict=True))
