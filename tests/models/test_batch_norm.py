import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import batch_norm_worker
from models.batch_norm_worker import (
    LAYERS,
    TOLERANCES,
    batch,
    convolution,
    layer,
    two_steps,
    under_autocast,
    under_policy,
)
from models.tiny import same_state, timm_model

from e2mc_hf.models.batch_norm import GlobalBatchNorm, synchronize_batch_norm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """What each of two processes computed on its half of the batches."""
    folder = tmp_path_factory.mktemp("two_processes")
    script = Path(batch_norm_worker.__file__)
    processes = [subprocess.Popen([sys.executable, str(script), str(rank), "2", str(folder)]) for rank in range(2)]
    try:
        assert [process.wait(timeout=180) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("kind", "dtype"), TOLERANCES)
def test_two_halves_on_two_processes_are_one_batch_on_one(halves, kind, dtype):
    first, second = (half[f"{kind}, {dtype}"] for half in halves)
    expected = two_steps(layer(kind, dtype), batch(kind, dtype))
    assert first.keys() == second.keys() == expected.keys() | {"names are kept", "all are global"}
    largest_gradient = max((g.abs().max() for name, g in expected.items() if name.startswith("gradient")), default=0.0)
    for name, whole in expected.items():
        scale = whole.abs().max()
        if name.startswith("buffer"):
            assert torch.equal(first[name], second[name]), name
            found = first[name]
        elif name.startswith("gradient of"):
            found, scale = first[name] + second[name], largest_gradient
        else:
            found = torch.cat([first[name], second[name]])
        assert found.dtype == whole.dtype
        assert (found - whole).abs().max() <= TOLERANCES[kind, dtype] * scale, name


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_is_converted_and_keeps_its_names(halves, kind):
    for half in halves:
        assert half[f"{kind}, {torch.float64}"]["names are kept"]
        assert half[f"{kind}, {torch.float64}"]["all are global"]


def test_under_bfloat16_autocast_statistics_are_those_of_the_whole_batch_in_float32(halves):
    first, second = (half["autocast"] for half in halves)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = under_autocast(convolution(), images)
    assert torch.cat([first["output"], second["output"]]).dtype == expected["output"].dtype == torch.bfloat16
    for name in ("1.running_mean", "1.running_var"):
        assert first[name].dtype == torch.float32
        assert torch.allclose(first[name], expected[name], rtol=1e-5, atol=1e-6)
    assert (torch.cat([first["output"], second["output"]]) - expected["output"]).abs().max() <= 2**-6
    gradient = first["gradient"] + second["gradient"]
    assert (gradient - expected["gradient"]).norm() <= 0.02 * expected["gradient"].norm()


KINDS = {
    "train": ["BatchNormAct2d", "BatchNorm1d"],
    "synchronized": ["GlobalBatchNorm", "GlobalBatchNorm"],
    "recalibrated": ["GlobalBatchNorm", "GlobalBatchNorm"],
    "frozen": ["FrozenBatchNorm", "GlobalBatchNorm"],
}


@pytest.mark.parametrize("policy", KINDS)
def test_on_two_processes_each_policy_has_its_layers(halves, policy):
    assert [half[policy]["kinds"] for half in halves] == [KINDS[policy]] * 2


@pytest.mark.parametrize("policy", ["synchronized", "recalibrated", "frozen"])
def test_on_two_processes_policies_normalize_and_estimate_as_on_one(halves, policy):
    first, second = (half[policy] for half in halves)
    whole = under_policy(policy, lambda images: images)
    assert torch.allclose(torch.cat([first["output"], second["output"]]), whole["output"], rtol=1e-12, atol=1e-12)
    assert first["count"] == second["count"] == whole["count"] == (0 if policy == "frozen" else 3)
    for stage in ("buffers", "estimated"):
        for name, expected in whole[stage].items():
            assert torch.equal(first[stage][name], second[stage][name]), name
            assert torch.allclose(first[stage][name], expected, rtol=1e-12, atol=1e-12), name


def test_on_two_processes_the_policy_train_normalizes_shares_apart(halves):
    first, second = (half["train"] for half in halves)
    whole = under_policy("train", lambda images: images)
    assert (torch.cat([first["output"], second["output"]]) - whole["output"]).abs().max() > 1e-3
    name = "backbone.1.running_mean"
    assert not torch.equal(first["buffers"][name], second["buffers"][name])
    assert torch.allclose((first["buffers"][name] + second["buffers"][name]) / 2, whole["buffers"][name])


def test_a_second_conversion_for_cuda_keeps_the_activations(halves):
    for half in halves:
        assert half["converted twice"] == ["SyncBatchNormAct", "ReLU", "SyncBatchNorm"]


def test_layers_that_talk_are_part_of_one_compiled_graph_for_each_size(halves):
    same = {f"same {part}": True for part in ("outputs", "gradients", "statistics")}
    for half in halves:
        assert half["compiled"] == {"graphs": 2, "breaks": 0, **same}


def test_what_is_compiled_for_cuda_gets_layers_that_can_be_part_of_a_graph(halves):
    for half in halves:
        assert half["converted for compilation"] == ["GlobalBatchNorm", "ReLU", "SyncBatchNorm"]


def test_one_process_keeps_its_model_as_it_is():
    model = timm_model("resnet18")
    modules, state = list(model.modules()), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = synchronize_batch_norm(model, CPU)
    assert converted is model
    assert list(converted.modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in converted.state_dict().items())


@pytest.mark.parametrize("kind", LAYERS)
def test_on_one_process_the_global_layer_is_the_plain_one(kind):
    plain, other = layer(kind, torch.float64), layer(kind, torch.float64)
    for module in list(other.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
                setattr(module, name, GlobalBatchNorm(child))
    assert same_state(other, plain)
    expected, found = (two_steps(model, batch(kind, torch.float64)) for model in (plain, other))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
