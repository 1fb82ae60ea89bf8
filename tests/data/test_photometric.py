from itertools import permutations

import numpy as np
import pytest
import torch
from data.decoded_image import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.blur import kernel_size
from e2mc_hf.data.draws import Colors
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.photometric import Photometry
from e2mc_hf.data.views import ViewTransform

PLAIN = Photometry((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IMAGENET = ImageSettings(size=32)
COLORS = st.builds(
    Colors,
    jitter_order=st.integers(0, 23).map(float),
    brightness=st.sampled_from([1.0, 0.0, 0.3, 1.4, 2.0]) | st.floats(0, 2),
    contrast=st.sampled_from([1.0, 0.0, 1.4]) | st.floats(0, 2),
    saturation=st.sampled_from([1.0, 0.0, 1.2]) | st.floats(0, 2),
    hue=st.sampled_from([0.0, -0.5, 0.5, 1 / 6]) | st.floats(-0.5, 0.5),
    grayscale=st.sampled_from([0.0, 0.0, 1.0]),
    blur_sigma=st.sampled_from([0.0, 0.1, 2.0, 100.0]) | st.floats(0.1, 4),
    solarize=st.sampled_from([0.0, 1.0]),
)


def smooth(size, seed=0):
    """An image with large shapes, gray and saturated places, pure black and pure white."""
    image = torch.from_numpy(np.random.default_rng(seed).integers(-60, 316, (1, 3, 5, 5)).astype(np.float32))
    image = torch.nn.functional.interpolate(image, (size, size), mode="bicubic")[0].clamp(0, 255).round()
    image[:, : size // 4] = image[:1, : size // 4]
    return image.to(torch.uint8)


def torchvisions(view, colors):
    """The same steps by torchvision, on a float image in [0, 1]."""
    image = functional.to_dtype(view, torch.float32, scale=True)
    adjustments = [
        (functional.adjust_brightness, colors.brightness),
        (functional.adjust_contrast, colors.contrast),
        (functional.adjust_saturation, colors.saturation),
        (functional.adjust_hue, colors.hue),
    ]
    for place in list(permutations(range(4)))[int(colors.jitter_order)]:
        adjust, strength = adjustments[place]
        image = adjust(image, strength)
    if colors.grayscale:
        image = functional.rgb_to_grayscale(image, 3)
    if colors.blur_sigma:
        image = functional.gaussian_blur(image, [kernel_size(view.shape[-1])] * 2, [colors.blur_sigma] * 2)
    return functional.solarize(image, 0.5) if colors.solarize else image


def finish(view, colors, photometry=PLAIN):
    return photometry([view[None]], [torch.tensor([colors])])[0][0]


def assert_as_torchvision(view, colors):
    own, theirs = finish(view, colors), torchvisions(view, colors)
    assert (own - theirs).abs().max() < 1e-3


@given(COLORS, st.sampled_from([8, 33, 224]), st.integers(0, 5), st.booleans())
@settings(max_examples=120)
def test_a_view_is_torchvisions_to_a_thousandth(colors, size, seed, noisy):
    view = torch.from_numpy(noise(size, size, seed).full).permute(2, 0, 1) if noisy else smooth(size, seed)
    assert_as_torchvision(view, colors)


@pytest.mark.parametrize("order", range(24))
def test_every_order_of_jitter_is_torchvisions(order):
    assert_as_torchvision(smooth(32), Colors(float(order), 1.4, 1.4, 0.5, 0.3))


def test_no_two_orders_of_jitter_are_the_same():
    view = smooth(32)
    results = {finish(view, Colors(float(order), 1.4, 1.4, 0.5, 0.3)).numpy().tobytes() for order in range(24)}
    assert len(results) == 24


@pytest.mark.parametrize("hue", [-0.5, -0.37, -1 / 6, -0.1, 0.001, 0.05, 1 / 6, 1 / 3, 0.5])
def test_hue_is_torchvisions_on_every_color(hue):
    steps = torch.linspace(0, 255, 33).round().to(torch.uint8)
    view = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij")).view(3, 33, 33 * 33)
    assert_as_torchvision(view, Colors(hue=hue))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 0.999, 1.7])
def test_each_factor_is_torchvisions(name, factor):
    assert_as_torchvision(smooth(48), Colors(**{name: factor}))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0, 2.0, 4.0, 30.0])
@pytest.mark.parametrize("size", [8, 32, 96, 128, 224])
def test_blur_is_torchvisions_with_a_kernel_of_a_tenth_of_the_side(sigma, size):
    view = torch.from_numpy(noise(size, size).full).permute(2, 0, 1)
    assert_as_torchvision(view, Colors(blur_sigma=sigma))


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (32, 3), (96, 9), (128, 13), (224, 23)])
def test_blur_kernels_are_odd_and_a_tenth_of_the_side(size, kernel):
    assert kernel_size(size) == kernel


def test_contrast_is_about_the_mean_of_each_image():
    dark, bright = (torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (51, 204))
    views = PLAIN([torch.stack([dark, bright])], [torch.tensor([Colors(contrast=0.0)] * 2)])[0]
    assert views[0].unique().tolist() == pytest.approx([0.2], abs=1e-4)
    assert views[1].unique().tolist() == pytest.approx([0.8], abs=1e-4)


def test_solarization_inverts_the_brighter_half():
    view = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).expand(3, 4, 4)
    solarized = finish(view, Colors(solarize=1.0))
    assert (solarized[0, 0] * 255).round().tolist() == [0, 127, 127, 0]


def test_without_colors_a_view_is_only_normalized():
    photometry = Photometry(IMAGENET.mean, IMAGENET.std)
    view = smooth(32)
    scaled = functional.to_dtype(view, torch.float32, scale=True)
    expected = functional.normalize(scaled, list(IMAGENET.mean), list(IMAGENET.std))
    assert torch.equal(finish(view, Colors(), photometry), expected)
    assert torch.allclose(photometry.denormalized(expected), scaled, atol=1e-6)


@given(st.lists(COLORS, min_size=2, max_size=24), st.sampled_from([8, 32, 160]))
@settings(max_examples=60)
def test_a_sample_is_the_same_alone_and_in_any_batch(rows, size):
    views = torch.stack([smooth(size, seed) for seed in range(len(rows))])
    together = PLAIN([views], [torch.tensor(rows)])[0]
    for place, colors in enumerate(rows):
        assert torch.equal(together[place], finish(views[place], colors))
    backward = PLAIN([views.flip(0)], [torch.tensor(rows).flip(0)])[0]
    assert torch.equal(backward.flip(0), together)


def test_a_batch_is_the_same_for_any_number_of_threads():
    rows = [Colors(float(order), 1.3, 0.7, 1.1, 0.1, blur_sigma=1.0) for order in range(4)]
    views, threads = torch.stack([smooth(224, seed) for seed in range(4)]), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(PLAIN([views], [torch.tensor(rows)])[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_views_of_several_sizes_keep_their_places_and_are_left_as_they_are():
    views = [torch.stack([smooth(size, seed) for seed in range(3)]) for size in (32, 32, 16, 96)]
    copies = [view.clone() for view in views]
    rows = [torch.tensor([Colors(brightness=factor)] * 3) for factor in (0.5, 1.0, 0.0, 1.5)]
    finished = PLAIN(views, rows)
    assert [(tuple(view.shape), view.dtype) for view in finished] == [
        ((3, 3, size, size), torch.float32) for size in (32, 32, 16, 96)
    ]
    for view, own, factor in zip(views, finished, (0.5, 1.0, 0.0, 1.5), strict=True):
        assert torch.allclose(own, (view / 255 * factor).clamp(0, 1), atol=1e-6)
    assert all(map(torch.equal, views, copies))


def test_an_empty_batch_stays_empty():
    assert PLAIN([torch.empty(0, 3, 8, 8, dtype=torch.uint8)], [torch.empty(0, len(Colors._fields))])[0].shape[0] == 0


def test_no_step_reads_from_the_device():
    """On the meta device nothing can be read: whatever is decided is decided from the parameters, on the CPU."""
    rows = [Colors(float(order), 0.9, 1.1, 1.2, 0.1 * (order % 2), float(order % 3 == 0), 0.5 * (order % 4),
                   float(order % 5 == 0)) for order in range(24)]  # fmt: skip
    views = torch.empty(24, 3, 224, 224, dtype=torch.uint8, device="meta")
    finished = PLAIN([views], [torch.tensor(rows)])[0]
    assert (finished.device.type, finished.shape, finished.dtype) == ("meta", views.shape, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_what_the_cpu_gives_without_waiting_for_it():
    rows = torch.tensor([Colors(float(place % 24), 0.9, 1.1, 1.2, 0.1 * (place % 2), float(place % 3 == 0),
                                0.5 * (place % 4), float(place % 5 == 0)) for place in range(70)])  # fmt: skip
    views = torch.stack([smooth(224, seed) for seed in range(70)])
    on_gpu = views.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        finished = PLAIN([on_gpu], [rows])[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (finished.cpu() - PLAIN([views], [rows])[0]).abs().max() < 1e-4


def test_results_take_part_in_training_without_a_history():
    view = finish(smooth(8), Colors(brightness=0.9))
    assert not view.requires_grad
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (view * weight).sum().backward()
    assert weight.grad is not None


def statistics_of(views):
    """Of each view: mean and spread of its colors, how colorful and how sharp it is."""
    gray = views.mean(dim=1)
    return {
        "mean": gray.mean(dim=(1, 2)),
        "spread": gray.std(dim=(1, 2)),
        "red": views[:, 0].mean(dim=(1, 2)) - gray.mean(dim=(1, 2)),
        "colorfulness": views.std(dim=1).mean(dim=(1, 2)),
        "sharpness": gray.diff(dim=2).abs().mean(dim=(1, 2)),
    }


@pytest.mark.parametrize("solarize_prob", [0.0, 0.5])
def test_views_are_distributed_as_torchvisions(solarize_prob):
    """The whole recipe, drawn and applied by each side in its own way, on one image."""
    count, size = 700, 32
    image = noise(5, 6, seed=3).pillow().resize((60, 50))
    arguments = ViewArguments(blur_prob=[0.5], solarize_prob=[solarize_prob], rotation_degrees=20.0)
    transform = ViewTransform(arguments, ImageSettings(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    source = noise(1, 1)
    source.full, source.size = np.array(image), image.size
    drawn = [transform(source, seed=0, epoch=0, sample_id=sample_id)[0] for sample_id in range(count)]
    own = transform.photometry(
        [torch.stack([view.pixels for view in drawn])], [torch.stack([view.photometry for view in drawn])]
    )[0]
    steps = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(20.0, interpolation=v2.InterpolationMode.BILINEAR),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel_size(size), (0.1, 2.0))], p=0.5),
            v2.RandomSolarize(0.5, solarize_prob),
        ]
    )
    theirs = statistics_of(torch.stack([steps(image) for _ in range(count)]))
    for name, values in statistics_of(own).items():
        assert stats.ks_2samp(values.numpy(), theirs[name].numpy()).pvalue > 1e-3, name
