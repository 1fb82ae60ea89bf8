import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.seeds import derive_seed
from e2mc_hf.data.views import GaussianBlur, ViewTransform, evaluation_transform

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
SETTINGS = ImageSettings(size=32)
PLAIN = {"crop_scale": [1.0, 1.0], "flip_prob": 0.0, "jitter_prob": 0.0, "grayscale_prob": 0.0}
NO_TENSOR_STEPS = {"blur_prob": [0.0], "solarize_prob": [0.0]}


def draw(seed=0, epoch=0, sample_id=0, **recipe):
    return ViewTransform(ViewArguments(**recipe), SETTINGS)(PHOTO, seed=seed, epoch=epoch, sample_id=sample_id)


def steps(view, **recipe):
    return [type(step).__name__ for step in ViewTransform(ViewArguments(**recipe), SETTINGS).pipelines[view].transforms]


def test_views_are_normalized_float_tensors_of_the_encoders_size():
    views = draw(num_views=3, blur_prob=[0.5], solarize_prob=[0.1])
    assert [(view.shape, view.dtype) for view in views] == [((3, 32, 32), torch.float32)] * 3


def test_image_size_overrides_the_encoders_size():
    assert draw(image_size=16)[0].shape == (3, 16, 16)


def test_statistics_are_the_settings_own():
    settings = ImageSettings(size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.1))
    recipe = ViewArguments(**PLAIN, **NO_TENSOR_STEPS)
    view = ViewTransform(recipe, settings)(Image.new("RGB", (8, 8), "white"), seed=0, epoch=0, sample_id=0)[0]
    assert torch.allclose(view[:, 0, 0], torch.tensor([1.8, 3.2, 7.0]))


def test_interpolation_is_the_settings_own():
    transforms = [
        ViewTransform(ViewArguments(), ImageSettings(8, interpolation=name)) for name in ("bilinear", "bicubic")
    ]
    views = [transform(PHOTO, seed=0, epoch=0, sample_id=0)[1] for transform in transforms]
    assert not torch.equal(*views)


def test_interpolation_can_be_set():
    transform = ViewTransform(ViewArguments(interpolation="bicubic"), ImageSettings(8, interpolation="bilinear"))
    bicubic = ViewTransform(ViewArguments(), ImageSettings(8, interpolation="bicubic"))
    first, second = (chosen(PHOTO, seed=0, epoch=0, sample_id=0) for chosen in (transform, bicubic))
    assert all(map(torch.equal, first, second))


def test_a_view_is_torchvisions_own_steps_under_the_views_seed():
    recipe = ViewArguments(blur_prob=[0.0], solarize_prob=[0.5])
    steps = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.08, 1.0), interpolation=v2.InterpolationMode.BILINEAR, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomSolarize(0.5, 0.5),
            v2.Normalize(list(SETTINGS.mean), list(SETTINGS.std)),
        ]
    )
    transform = ViewTransform(recipe, SETTINGS)
    for sample_id in range(10):
        for place, view in enumerate(transform(PHOTO, seed=7, epoch=2, sample_id=sample_id)):
            torch.manual_seed(derive_seed(7, 2, sample_id, place))
            assert torch.equal(view, steps(PHOTO))


def test_the_same_draw_gives_the_same_views_in_any_order():
    transform = ViewTransform(ViewArguments(), SETTINGS)
    forward = [transform(PHOTO, seed=0, epoch=1, sample_id=index) for index in range(4)]
    backward = [transform(PHOTO, seed=0, epoch=1, sample_id=index) for index in reversed(range(4))]
    for first, second in zip(forward, reversed(backward), strict=True):
        assert all(map(torch.equal, first, second))


@given(st.sets(st.tuples(st.integers(0, 2**40), st.integers(0, 99), st.integers(0, 2**40)), min_size=2, max_size=4))
@settings(deadline=None, database=None, max_examples=15)
def test_any_two_of_seed_epoch_sample_and_view_give_different_views(keys):
    same = {"blur_prob": [0.0], "solarize_prob": [0.0]}
    views = [view for seed, epoch, sample_id in keys for view in draw(seed, epoch, sample_id, **same)]
    assert len({view.numpy().tobytes() for view in views}) == len(views)


def test_the_global_random_states_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1]
    draw()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_steps_of_probability_zero_are_left_out():
    assert steps(0, **PLAIN, **NO_TENSOR_STEPS) == ["RandomResizedCrop", "PILToTensor", "ToDtype", "Normalize"]


def test_blur_and_solarization_differ_by_view():
    first, second = (steps(view, blur_prob=[1.0, 0.0], solarize_prob=[0.0, 1.0]) for view in (0, 1))
    assert first[6:] == ["RandomApply", "Normalize"]
    assert second[6:] == ["RandomSolarize", "Normalize"]


def test_blur_by_columns_and_rows_is_torchvisions_blur():
    image = torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(0))
    blurred = []
    for blur in (GaussianBlur(9, (0.5, 3.0)), v2.GaussianBlur(9, (0.5, 3.0))):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            blurred.append(blur(image))
    assert torch.allclose(*blurred, atol=1e-6)
    assert not torch.allclose(blurred[0], image, atol=0.1)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 4.0])
def test_the_strength_of_the_blur_is_the_recipes_own(sigma):
    recipe = PLAIN | {"blur_prob": [1.0], "solarize_prob": [0.0], "blur_sigma": [sigma, sigma]}
    settings = ImageSettings(size=128, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image = PHOTO.resize((128, 128))
    view = ViewTransform(ViewArguments(**recipe), settings)(image, seed=0, epoch=0, sample_id=0)[0]
    expected = v2.GaussianBlur(13, (sigma, sigma))(
        v2.functional.to_dtype(v2.functional.pil_to_tensor(image), scale=True)
    )
    assert torch.allclose(view, expected, atol=1e-6)


def test_solarization_inverts_the_brighter_half():
    image = Image.fromarray(np.array([[0, 127, 128, 255]] * 4, dtype=np.uint8)).convert("RGB")
    settings = ImageSettings(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pipeline = ViewTransform(ViewArguments(**PLAIN, blur_prob=[0.0], solarize_prob=[1.0]), settings).pipelines[0]
    solarized = v2.Compose(pipeline.transforms[1:])(image)
    assert (solarized[0, 0] * 255).round().tolist() == [0, 127, 127, 0]


def test_rotation_is_there_only_if_asked_for():
    assert "RandomRotation" not in steps(0)
    assert "RandomRotation" in steps(0, rotation_degrees=15.0)


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (32, 3), (96, 9), (128, 13), (224, 23)])
def test_blur_kernels_are_odd_and_a_tenth_of_the_side(size, kernel):
    pipeline = ViewTransform(ViewArguments(image_size=size), SETTINGS).pipelines[0]
    blurs = [step.transforms[0] for step in pipeline.transforms if isinstance(step, v2.RandomApply)]
    assert blurs[-1].kernel_size == kernel


def test_without_random_steps_a_view_is_the_normalized_image():
    image = PHOTO.resize((32, 32))
    recipe = ViewArguments(**PLAIN, **NO_TENSOR_STEPS)
    view = ViewTransform(recipe, SETTINGS)(image, seed=0, epoch=0, sample_id=0)[0]
    assert torch.equal(view, evaluation_transform(SETTINGS)(image))


@pytest.mark.parametrize("shape", [(50, 40), (20, 60), (5, 5)])
def test_evaluation_gives_the_encoders_size_for_every_shape(shape):
    assert evaluation_transform(ImageSettings(size=28, crop_share=0.875))(PHOTO.resize(shape)).shape == (3, 28, 28)


def test_evaluation_crops_the_center_share():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (2, 2, 30, 30))
    settings = ImageSettings(size=28, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop_share=0.875)
    assert evaluation_transform(settings)(image).min() == 1
