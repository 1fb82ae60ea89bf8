import copy
import logging

import pytest
import timm
import torch
from models.batch_norm_worker import LAYERS, batch, layer, two_steps
from models.tiny import TIMM, TRANSFORMERS, randomized, same_state, transformers_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.norm_policy import FrozenBatchNorm, apply_norm_policy, freeze_statistics, recalibrate
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.objectives.teacher import set_teacher_mode, update_teacher
from e2mc_hf.publishing.encoder import export_encoder

CPU = torch.device("cpu")
SIZE = 32
NETWORKS = {"resnet18": TIMM["resnet18"], "mobilenetv3_small_050": {}, "test_efficientnet": {}}
WITH_STATISTICS = [kind for kind in LAYERS if kind != "without running statistics"]


def network(name: str, **options: object) -> Backbone:
    arguments = NETWORKS.get(name, TIMM.get(name)) | options
    return randomized(load_backbone(name, from_scratch=True, backbone_args=arguments, image_size=SIZE))


def images(seed: int = 0, count: int = 8) -> torch.Tensor:
    return 2 + torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


# Frozen


@pytest.mark.parametrize("kind", WITH_STATISTICS)
def test_a_frozen_layer_in_training_mode_is_the_plain_one_in_evaluation_mode(kind):
    plain, frozen = layer(kind, torch.float64), layer(kind, torch.float64)
    batches = [batch(kind, torch.float64)]
    two_steps(plain, batches[0])  # statistics that are not those of a constructor
    frozen.load_state_dict(plain.state_dict())
    assert freeze_statistics(frozen)
    assert list(frozen.state_dict()) == list(plain.state_dict())
    plain.eval()
    frozen.train()
    for model in (plain, frozen):
        model.zero_grad()
    found, expected = (two_steps(model, batches[0]) for model in (frozen, plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any(isinstance(module, _BatchNorm) for module in frozen.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_backbone_keeps_its_statistics_through_training_while_the_head_learns_its_own(name):
    backbone = network(name)
    names = list(backbone.state_dict())
    model = SSLModel.from_backbone(backbone, "vicreg", {"projector_dim": 8}, image_size=SIZE)
    with torch.no_grad():
        expected = backbone.eval()(images())
    assert apply_norm_policy(model, model.backbone, "frozen", CPU) is model
    assert list(backbone.state_dict()) == names
    before, of_the_head = statistics(backbone), statistics(model.objective)
    weights = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
    model.train()
    with torch.no_grad():
        assert torch.equal(backbone(images()), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        model([images(step), images(step + 10)]).loss.backward()
        optimizer.step()
    assert unchanged(backbone, before)
    assert not unchanged(model.objective, of_the_head)
    moved = [name for name, parameter in backbone.named_parameters() if not torch.equal(parameter, weights[name])]
    assert any("bn" in name for name in moved)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frozen_backbone_is_exported_as_a_plain_one(name, tmp_path):
    backbone = network(name)
    freeze_statistics(backbone)
    export_encoder(backbone, tmp_path / "encoder")
    plain = timm.create_model(name, num_classes=0, **NETWORKS[name])
    plain.load_state_dict(backbone.model.timm_model.state_dict())
    again = load_backbone(str(tmp_path / "encoder"))
    assert same_state(again, backbone)
    with torch.no_grad():
        for encoder in (plain.eval(), again.eval()):
            assert torch.allclose(encoder(images()), backbone.eval()(images()), rtol=1e-5, atol=1e-5)


def test_a_frozen_resnet_of_transformers_is_saved_as_a_plain_one(tmp_path):
    backbone = Backbone(transformers_model("resnet"), ImageSettings(size=SIZE))
    assert len(freeze_statistics(backbone)) == 6
    backbone.model.save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path))
    assert same_state(again, backbone)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in again.modules()) == 6


def test_a_teacher_follows_its_frozen_student():
    student = network("resnet18")
    teacher = copy.deepcopy(student)
    apply_norm_policy(nn.ModuleList([student, teacher]), nn.ModuleList([student, teacher]), "frozen", CPU)
    late = copy.deepcopy(student)
    for follower in (teacher, late):
        before = statistics(follower)
        set_teacher_mode(follower, True)
        with torch.no_grad():
            in_training = follower(images())
            assert torch.equal(in_training, follower.eval()(images()))
        assert unchanged(follower, before)
        with torch.no_grad():
            student.model.timm_model.conv1.weight.add_(1)
        update_teacher(student, follower, 0.0, "copy")
        assert same_state(student, follower)


def test_frozen_statistics_are_used_in_float32_under_autocast():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    frozen = copy.deepcopy(plain)
    freeze_statistics(frozen)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frozen.train()(images()), plain(images()))


def test_a_layer_without_statistics_cannot_be_frozen():
    model = nn.Sequential(nn.BatchNorm2d(5, track_running_stats=False))
    with pytest.raises(UsageError, match="layers without running statistics, got one of 5 channels"):
        apply_norm_policy(model, model, "frozen", CPU)


def test_only_the_layers_asked_for_are_frozen():
    backbone = network("resnet18")
    frozen = freeze_statistics(backbone, where=lambda name: "layer1.0.bn" in name)
    assert frozen == ["model.timm_model.layer1.0.bn1", "model.timm_model.layer1.0.bn2"]
    assert isinstance(backbone.get_submodule(frozen[0]), FrozenBatchNorm)
    assert isinstance(backbone.model.timm_model.bn1, nn.BatchNorm2d)


# Policies


def test_an_unknown_policy_is_refused_with_the_known_ones():
    model = network("resnet18")
    rule = "`batch_norm` must be one of train, frozen, synchronized, recalibrated, got 'sync'"
    with pytest.raises(UsageError, match=rule):
        apply_norm_policy(model, model, "sync", CPU)


@pytest.mark.parametrize("policy", ["train", "synchronized", "recalibrated"])
def test_on_one_process_the_other_policies_change_nothing_before_training(policy):
    model = network("resnet18")
    modules = list(model.modules())
    assert apply_norm_policy(model, model, policy, CPU) is model
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize(("policy", "warned"), [("frozen", 1), ("recalibrated", 1), ("train", 0), ("synchronized", 0)])
def test_a_policy_without_effect_is_named(policy, warned, caplog):
    model = nn.Sequential(Backbone(transformers_model("vit"), ImageSettings(size=SIZE)), nn.BatchNorm1d(32))
    with caplog.at_level(logging.WARNING, logger="e2mc_hf"):
        apply_norm_policy(model, model[0], policy, CPU)
    assert len(caplog.records) == warned
    assert all(f"`batch_norm` {policy} has no effect" in record.getMessage() for record in caplog.records)
    assert isinstance(model[1], nn.BatchNorm1d)


def test_a_policy_applied_twice_is_as_once(caplog):
    model = network("resnet18")
    apply_norm_policy(model, model, "frozen", CPU)
    modules = list(model.modules())
    apply_norm_policy(model, model, "frozen", CPU)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert not caplog.records


# Recalibration


def test_recalibrated_statistics_are_the_means_over_batches():
    module = nn.Sequential(nn.BatchNorm2d(3, momentum=0.5))
    module.double()
    batches = [images(seed).double() for seed in range(4)]
    module(torch.full((2, 3, 4, 4), 1e6, dtype=torch.float64))  # what an average over the past would never lose
    assert recalibrate(module, batches) == 4
    stacked = torch.stack([image.transpose(0, 1).flatten(1) for image in batches])
    assert torch.allclose(module[0].running_mean, stacked.mean(2).mean(0), rtol=1e-12)
    assert torch.allclose(module[0].running_var, stacked.var(2).mean(0), rtol=1e-12)
    assert module[0].num_batches_tracked == 4
    assert module[0].momentum == 0.5


def test_one_batch_makes_evaluation_mode_agree_with_training_mode():
    backbone = network("resnet18").double()
    view = images(count=64).double()
    with torch.no_grad():
        expected = backbone.train()(view)
        distant = (backbone.eval()(view) - expected).norm() / expected.norm()
        recalibrate(backbone, [view])
        close = (backbone.eval()(view) - expected).norm() / expected.norm()
    assert distant > 0.1
    assert close < 0.05  # not 0: running variances are unbiased, those of a batch are not


def test_recalibration_leaves_everything_but_statistics_as_it_was():
    backbone = network("resnet18", drop_path_rate=0.5).train()
    backbone.model.timm_model.layer4.eval()
    modes = [module.training for module in backbone.modules()]
    weights = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
    twin = copy.deepcopy(backbone)
    recalibrate(backbone, [images(0), images(1)])
    recalibrate(twin, [images(0), images(1)])
    assert same_state(twin, backbone)  # stochastic depth took no part
    assert [module.training for module in backbone.modules()] == modes
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is None


def test_recalibration_passes_over_frozen_layers():
    backbone = network("resnet18")
    freeze_statistics(backbone, where=lambda name: name.endswith("timm_model.bn1"))
    before = statistics(backbone)
    assert recalibrate(backbone, [images()]) == 1
    changed = {name for name, buffer in backbone.named_buffers() if not torch.equal(buffer, before[name])}
    assert "model.timm_model.layer1.0.bn1.running_mean" in changed
    assert not any(name.startswith("model.timm_model.bn1.") for name in changed)


def test_a_backbone_without_statistics_is_left_alone():
    backbone = Backbone(transformers_model("vit"), ImageSettings(size=TRANSFORMERS["vit"]["image_size"]))
    before = copy.deepcopy(backbone)
    assert recalibrate(backbone, []) == 0
    assert same_state(backbone, before)


def broken():
    yield images()
    raise OSError("the disk is gone")


@pytest.mark.parametrize(("batches", "error"), [(lambda: [], UsageError), (broken, OSError)])
def test_without_batches_or_after_a_failure_the_statistics_are_those_of_before(batches, error):
    backbone = network("resnet18").train()
    before, momentum = statistics(backbone), backbone.model.timm_model.bn1.momentum
    with pytest.raises(error):
        recalibrate(backbone, batches())
    assert unchanged(backbone, before)
    assert backbone.model.timm_model.bn1.momentum == momentum
    assert all(module.training for module in backbone.modules())
