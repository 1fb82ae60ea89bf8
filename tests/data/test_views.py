import io
import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from data.decoded_image import DecodedImage, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.decoding import EncodedImage
from e2mc_hf.data.draws import Colors, Place, draw_view, uniforms
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.views import ViewTransform, evaluation_transform

PHOTO = noise(40, 48)
SETTINGS = ImageSettings(size=32)
PLAIN = {
    "crop_scale": [1.0, 1.0],
    "flip_prob": 0.0,
    "jitter_prob": 0.0,
    "grayscale_prob": 0.0,
    "blur_prob": [0.0],
    "solarize_prob": [0.0],
}
ONE_VALUE = {"blur_prob": [0.5], "solarize_prob": [0.2]}


def draw(seed=0, epoch=0, sample_id=0, image=PHOTO, **recipe):
    return ViewTransform(ViewArguments(**recipe), SETTINGS)(image, seed=seed, epoch=epoch, sample_id=sample_id)


def finish(transform, samples):
    """What training would see of a batch."""
    views = list(zip(*samples, strict=True))
    pixels, photometry = ([torch.stack([getattr(view, part) for view in own]) for own in views]
                          for part in ("pixels", "photometry"))  # fmt: skip
    return transform.photometry(pixels, photometry)


def equal(first, second):
    return torch.equal(first.pixels, second.pixels) and torch.equal(first.photometry, second.photometry)


def test_views_are_8_bit_crops_of_the_encoders_size_and_the_parameters_of_their_colors():
    views = draw(num_views=3, blur_prob=[0.5], solarize_prob=[0.1])
    assert [(view.pixels.shape, view.pixels.dtype) for view in views] == [((3, 32, 32), torch.uint8)] * 3
    assert [view.photometry.shape for view in views] == [(len(Colors._fields),)] * 3
    assert all(view.photometry.dtype == torch.float32 for view in views)


def test_image_size_overrides_the_encoders_size():
    assert draw(image_size=16)[0].pixels.shape == (3, 16, 16)


def test_statistics_are_the_settings_own():
    settings = ImageSettings(size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.1))
    transform = ViewTransform(ViewArguments(**PLAIN), settings)
    white = transform(DecodedImage(np.full((8, 8, 3), 255, np.uint8)), seed=0, epoch=0, sample_id=0)
    view = finish(transform, [white])[0][0]
    assert torch.allclose(view[:, 0, 0], torch.tensor([1.8, 3.2, 7.0]))


def test_interpolation_is_the_settings_own():
    transforms = [
        ViewTransform(ViewArguments(), ImageSettings(8, interpolation=name)) for name in ("bilinear", "bicubic")
    ]
    views = [transform(PHOTO, seed=0, epoch=0, sample_id=0)[1].pixels for transform in transforms]
    assert not torch.equal(*views)


def test_interpolation_can_be_set():
    transform = ViewTransform(ViewArguments(interpolation="bicubic"), ImageSettings(8, interpolation="bilinear"))
    bicubic = ViewTransform(ViewArguments(), ImageSettings(8, interpolation="bicubic"))
    first, second = (chosen(PHOTO, seed=0, epoch=0, sample_id=0) for chosen in (transform, bicubic))
    assert all(map(equal, first, second))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_view_is_torchvisions_own_steps_at_the_parameters_drawn_for_it(interpolation):
    recipe = ViewArguments(
        blur_prob=[0.5], solarize_prob=[0.5], rotation_degrees=20.0, image_size=64, interpolation=interpolation
    )
    transform = ViewTransform(recipe, SETTINGS)
    tensor, mode = v2.functional.pil_to_tensor(PHOTO.pillow()), v2.InterpolationMode(interpolation)
    for sample_id in range(40):
        for place, view in enumerate(transform(PHOTO, seed=7, epoch=2, sample_id=sample_id)):
            numbers = uniforms(7, 2, sample_id, place, Place.END).tolist()
            crop, flip, angle, colors = draw_view(transform.recipes[place], numbers, PHOTO.size)
            expected = v2.functional.resized_crop(tensor, *crop, [64, 64], mode, antialias=True)
            expected = v2.functional.to_pil_image(expected.flip(-1) if flip else expected)
            expected = v2.functional.rotate(expected, angle, v2.InterpolationMode.BILINEAR)
            difference = view.pixels.int() - v2.functional.pil_to_tensor(expected).int()
            assert difference.abs().max() <= 2
            assert torch.equal(view.photometry, torch.tensor(colors))


def test_the_same_draw_gives_the_same_views_in_any_order():
    transform = ViewTransform(ViewArguments(), SETTINGS)
    forward = [transform(PHOTO, seed=0, epoch=1, sample_id=index) for index in range(4)]
    backward = [transform(PHOTO, seed=0, epoch=1, sample_id=index) for index in reversed(range(4))]
    for first, second in zip(forward, reversed(backward), strict=True):
        assert all(map(equal, first, second))


@given(st.sets(st.tuples(st.integers(0, 2**40), st.integers(0, 99), st.integers(0, 2**40)), min_size=2, max_size=4))
@settings(max_examples=50)
def test_any_two_of_seed_epoch_sample_and_view_give_different_views(keys):
    views = [view for seed, epoch, sample_id in keys for view in draw(seed, epoch, sample_id)]
    assert len({view.photometry.numpy().tobytes() + view.pixels.numpy().tobytes() for view in views}) == len(views)


def test_of_a_thousand_views_no_two_are_the_same():
    transform = ViewTransform(ViewArguments(num_views=4, image_size=8, jitter_prob=1.0, **ONE_VALUE), SETTINGS)
    views = [
        view.photometry.numpy().tobytes() + view.pixels.numpy().tobytes()
        for epoch in range(5)
        for sample_id in range(50)
        for view in transform(PHOTO, seed=0, epoch=epoch, sample_id=sample_id)
    ]
    assert len(set(views)) == len(views) == 1000


def test_a_pickled_transform_draws_the_same_views():
    transform = ViewTransform(ViewArguments(num_small_views=1), SETTINGS)
    copy = pickle.loads(pickle.dumps(transform))
    first, second = (own(PHOTO, seed=0, epoch=0, sample_id=0) for own in (transform, copy))
    assert all(map(equal, first, second))


def test_the_global_random_states_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1]
    transform = ViewTransform(ViewArguments(rotation_degrees=5.0), SETTINGS)
    finish(transform, [transform(PHOTO, seed=0, epoch=0, sample_id=0)])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_steps_of_probability_zero_leave_the_resized_image():
    view = draw(**PLAIN)[0]
    resized = PHOTO.pillow().crop((0, 0, 48, 40)).resize((32, 32), Image.Resampling.BILINEAR)
    assert (view.pixels.int() - v2.functional.pil_to_tensor(resized).int()).abs().max() <= 2
    assert torch.equal(view.photometry, torch.tensor(Colors()))


def test_blur_and_solarization_differ_by_view():
    first, second = draw(blur_prob=[1.0, 0.0], solarize_prob=[0.0, 1.0])
    first, second = (Colors(*view.photometry.tolist()) for view in (first, second))
    assert (first.blur_sigma > 0, first.solarize) == (True, 0.0)
    assert (second.blur_sigma, second.solarize) == (0.0, 1.0)


def test_a_flip_mirrors_the_same_crop():
    turned, plain = (draw(**PLAIN | {"flip_prob": prob, "crop_scale": [0.3, 0.6]})[0].pixels for prob in (1.0, 0.0))
    assert torch.equal(turned, plain.flip(-1))


def test_rotation_is_there_only_if_asked_for():
    plain, turned = (draw(**PLAIN | {"rotation_degrees": degrees})[0].pixels for degrees in (0.0, 45.0))
    assert not torch.equal(plain, turned)
    assert torch.equal(plain, draw(**PLAIN)[0].pixels)


def test_a_recipe_takes_every_option_about_views():
    """Each option, changed, changes what is drawn for some view of some image."""
    changes = {
        "num_views": 3,
        "image_size": 16,
        "crop_scale": [0.2, 0.9],
        "num_small_views": 1,
        "interpolation": "bicubic",
        "flip_prob": 0.9,
        "rotation_degrees": 9.0,
        "jitter_prob": 0.3,
        "jitter_strength": [0.4, 0.4, 0.2, 0.2],
        "grayscale_prob": 0.9,
        "blur_prob": [0.5, 0.1],
        "blur_sigma": [0.1, 3.0],
        "solarize_prob": [0.2, 0.9],
    }
    small = {"small_image_size": 24, "small_crop_scale": [0.2, 0.4]}
    assert {field.name for field in fields(ViewArguments)} - {"show_views"} == changes.keys() | small.keys()
    for base, changed in ((ONE_VALUE, changes), (ONE_VALUE | {"num_small_views": 1}, small)):
        for name, value in changed.items():
            plain, other = (
                [view for sample in range(8) for view in draw(sample_id=sample, **recipe)]
                for recipe in (base, base | {name: value})
            )
            assert len(plain) != len(other) or not all(map(equal, plain, other)), name


def test_without_random_steps_a_view_is_the_normalized_image():
    image = PHOTO.pillow().resize((32, 32))
    transform = ViewTransform(ViewArguments(**PLAIN), SETTINGS)
    view = finish(transform, [transform(DecodedImage(image), seed=0, epoch=0, sample_id=0)])[0][0]
    assert torch.allclose(view, evaluation_transform(SETTINGS)(image), atol=1e-6)


class LargeFile(DecodedImage):
    """A photograph that can be decoded at half its size, and notes what it was asked for."""

    def __init__(self, pixels, can_reduce=True):
        super().__init__(pixels)
        self.asked, self.can_reduce = [], can_reduce

    def pixels(self, reduction=1):
        self.asked.append(reduction)
        return self.full[:: reduction if self.can_reduce else 1, :: reduction if self.can_reduce else 1].copy()


def half(can_reduce=True, **recipe):
    """Views of 8 pixels out of an image of 101 x 130, whose large crops can do with half of it."""
    ramp = np.linspace(0, 255, 130).astype(np.uint8)
    file = LargeFile(np.broadcast_to(ramp[None, :, None], (101, 130, 3)).copy(), can_reduce)
    options = {"image_size": 8, "crop_scale": [0.5, 1.0], "small_image_size": 8, "small_crop_scale": [0.5, 1.0]}
    views = ViewTransform(ViewArguments(**options | recipe), SETTINGS)(file, seed=0, epoch=0, sample_id=0)
    return views, file.asked


def test_a_large_image_is_decoded_at_half_its_size_once():
    assert half()[1] == [2]
    assert half(num_small_views=3)[1] == [2]


def test_the_whole_size_is_decoded_if_one_large_crop_needs_it():
    assert half(num_views=2, crop_scale=[0.02, 1.0])[1] == [2]
    assert half(num_views=30, crop_scale=[0.02, 1.0], **ONE_VALUE)[1] == [1]


def test_small_views_that_need_more_decode_it_for_themselves():
    views, asked = half(num_small_views=3, small_crop_scale=[0.01, 0.05])
    assert asked == [1, 2]
    assert all(map(equal, views[:2], half()[0]))
    assert all(map(equal, views[:3], half(num_small_views=1, small_crop_scale=[0.01, 0.05])[0]))


def test_half_the_size_shows_the_same_crop():
    (own, _), (whole, asked) = half(), half(can_reduce=False)
    assert asked == [2]
    for first, second in zip(own, whole, strict=True):
        assert (first.pixels.int() - second.pixels.int()).abs().max() <= 3
        assert torch.equal(first.photometry, second.photometry)


def test_views_of_a_large_jpeg_file_are_those_of_its_pixels():
    image = noise(9, 12).pillow().resize((1600, 1200), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    whole = DecodedImage(EncodedImage(file.getvalue()).pixels())
    recipe = {"image_size": 64, "crop_scale": [0.3, 1.0]}
    for sample_id in range(4):
        views = draw(sample_id=sample_id, image=EncodedImage(file.getvalue()), **recipe)
        for first, second in zip(views, draw(sample_id=sample_id, image=whole, **recipe), strict=True):
            difference = (first.pixels.int() - second.pixels.int()).abs().float()
            assert not torch.equal(first.pixels, second.pixels)
            assert difference.mean() < 1
            assert difference.max() <= 8


@pytest.mark.parametrize("shape", [(50, 40), (20, 60), (5, 5)])
def test_evaluation_gives_the_encoders_size_for_every_shape(shape):
    image = PHOTO.pillow().resize(shape)
    assert evaluation_transform(ImageSettings(size=28, crop_share=0.875))(image).shape == (3, 28, 28)


def test_evaluation_crops_the_center_share():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (2, 2, 30, 30))
    settings = ImageSettings(size=28, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop_share=0.875)
    assert evaluation_transform(settings)(image).min() == 1
