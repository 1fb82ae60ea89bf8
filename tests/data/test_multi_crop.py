import numpy as np
import pytest
import torch
from data.decoded_image import DecodedImage, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError

PHOTO = noise(80, 96)
SETTINGS = ImageSettings(size=32)
PLAIN = {"flip_prob": 0.0, "jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": [0.0], "solarize_prob": [0.0]}


def transform(**recipe):
    return ViewTransform(ViewArguments(**{"num_small_views": 6, "small_image_size": 16} | recipe), SETTINGS)


def draw(seed=0, epoch=0, sample_id=0, image=PHOTO, **recipe):
    return transform(**recipe)(image, seed=seed, epoch=epoch, sample_id=sample_id)


def equal(first, second):
    return torch.equal(first.pixels, second.pixels) and torch.equal(first.photometry, second.photometry)


def stacked(samples):
    """Pixels and photometry of each view over the samples."""
    views = list(zip(*samples, strict=True))
    return [torch.stack([view.pixels for view in own]) for own in views], [
        torch.stack([view.photometry for view in own]) for own in views
    ]


def position_image(side):
    """Red grows along the rows, green along the columns: a crop shows where it was taken."""
    ramp = np.linspace(0, 255, side).round().astype(np.uint8)
    columns, rows = np.broadcast_to(ramp, (side, side)), np.broadcast_to(ramp[:, None], (side, side))
    return DecodedImage(np.stack([columns, rows, np.zeros_like(columns)], axis=-1))


def crop_sides(view):
    """Height and width of a crop of `position_image`, as shares of the image, from the inner half of the view."""
    view = view.pixels.float() / 255
    size = view.shape[-1]
    first, last = size // 4, size - 1 - size // 4
    share = size / (last - first)
    red, green = view[0].mean(dim=0), view[1].mean(dim=1)
    return (green[last] - green[first]).item() * share, (red[last] - red[first]).item() * share


def test_large_views_come_first_and_then_the_small_ones():
    assert [tuple(view.pixels.shape) for view in draw()] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 6
    sizes = [
        view.pixels.shape[-1] for view in draw(num_views=3, num_small_views=1, blur_prob=[0.5], solarize_prob=[0.1])
    ]
    assert sizes == [32, 32, 32, 16]


@pytest.mark.parametrize("num_small_views", [None, 0])
def test_without_small_views_there_are_only_large_ones(num_small_views):
    assert [view.pixels.shape[-1] for view in draw(num_small_views=num_small_views)] == [32, 32]


@pytest.mark.parametrize("num_views", [2, 3])
def test_small_views_leave_the_large_ones_bit_for_bit_as_they_are(num_views):
    recipe = {"num_views": num_views, "blur_prob": [0.5], "solarize_prob": [0.3], "rotation_degrees": 10.0}
    for sample_id in range(10):
        alone = draw(sample_id=sample_id, num_small_views=0, **recipe)
        together = draw(sample_id=sample_id, num_small_views=2, **recipe)
        assert len(alone) == num_views
        assert all(map(equal, alone, together[:num_views]))


def test_more_small_views_leave_the_earlier_ones_as_they_are():
    assert all(map(equal, draw(num_small_views=2), draw(num_small_views=6)[:4]))


def test_the_same_draw_gives_the_same_views_in_any_order():
    views = transform()
    forward = [views(PHOTO, seed=0, epoch=1, sample_id=index) for index in range(4)]
    backward = [views(PHOTO, seed=0, epoch=1, sample_id=index) for index in reversed(range(4))]
    for first, second in zip(forward, reversed(backward), strict=True):
        assert all(map(equal, first, second))


def test_no_two_small_views_of_any_draw_are_the_same():
    views = [view for sample_id in range(20) for epoch in range(2) for view in draw(0, epoch, sample_id)[2:]]
    assert len({view.pixels.numpy().tobytes() for view in views}) == 240


def crop_shares(views):
    sides = torch.tensor([crop_sides(view) for view in views])
    return sides.prod(dim=1), sides[:, 1] / sides[:, 0]


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.14), (0.3, 0.4)])
def test_areas_of_small_crops_spread_evenly_over_their_range(low, high):
    image, recipe = position_image(256), PLAIN | {"crop_scale": [0.9, 1.0], "small_crop_scale": [low, high]}
    views = ViewTransform(ViewArguments(num_small_views=6, small_image_size=32, **recipe), SETTINGS)
    drawn = [views(image, seed=0, epoch=0, sample_id=sample_id) for sample_id in range(60)]
    areas, aspects = crop_shares([view for sample in drawn for view in sample[2:]])
    assert low * 0.95 < areas.min() < low + 0.15 * (high - low)
    assert high - 0.15 * (high - low) < areas.max() < high * 1.05
    assert areas.mean().item() == pytest.approx((low + high) / 2, rel=0.05)
    assert areas.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.15)
    assert 3 / 4 * 0.95 < aspects.min() < 0.85
    assert 1.2 < aspects.max() < 4 / 3 * 1.05
    large_areas, _ = crop_shares([view for sample in drawn for view in sample[:2]])
    assert large_areas.min() > 0.85


def test_blur_goes_by_the_size_of_the_view():
    """A wide blur shows the kernel: 23 pixels of 224, 9 of 96."""
    dot = np.zeros((480, 480, 3), np.uint8)
    dot[230:250, 230:250] = 255
    whole = {"crop_scale": [1.0, 1.0], "small_crop_scale": [1.0, 1.0]}
    widths = []
    for prob in (0.0, 1.0):
        recipe = PLAIN | whole | {"blur_prob": [prob], "blur_sigma": [30.0, 30.0]}
        views = transform(num_small_views=1, image_size=224, small_image_size=96, **recipe)
        finished = views.photometry(*stacked([views(DecodedImage(dot), seed=0, epoch=0, sample_id=0)]))
        widths.append([int((view[0, 0] > view[0, 0].min()).any(dim=0).sum()) for view in finished])
    assert [blurred - plain for plain, blurred in zip(*widths, strict=True)] == [22, 22, 8]


@pytest.mark.parametrize(
    ("given", "of_each"),
    [
        ([0.25], [0.25, 0.25, 0.25, 0.25]),
        ([0.0, 0.5], [0.0, 0.5, 0.5, 0.5]),
        ([0.0, 0.5, 0.25, 0.75], [0.0, 0.5, 0.25, 0.75]),
    ],
)
def test_a_list_holds_one_value_or_one_a_large_view_or_one_a_view(given, of_each):
    recipes = transform(num_small_views=2, solarize_prob=given, blur_prob=given).recipes
    assert [recipe.solarize_prob for recipe in recipes] == of_each
    assert [recipe.blur_prob for recipe in recipes] == of_each


@given(st.integers(2, 4), st.integers(0, 8), st.data())
@settings(max_examples=50)
def test_a_spread_list_has_one_value_a_view_and_keeps_those_given_in_their_places(num_views, num_small, data):
    length = data.draw(st.sampled_from([1, num_views, num_views + num_small]))
    values = data.draw(st.lists(st.floats(0, 1), min_size=length, max_size=length))
    recipe = ViewArguments(num_views=num_views, num_small_views=num_small, blur_prob=values, solarize_prob=[0.0])
    spread = recipe.of_each_view(values)
    assert len(spread) == num_views + num_small
    assert spread[:length] == values
    assert set(spread[length:]) <= {values[-1]}


@pytest.mark.parametrize("length", [3, 7, 9])
def test_a_list_of_another_length_is_refused_with_both_lengths_it_may_have(length):
    rule = r"^`blur_prob` must hold one value, or one for each of the 2 large views or of all 8 views, got \[0"
    with pytest.raises(UsageError, match=rule):
        ViewArguments(num_small_views=6, blur_prob=[0.5] * length)


def test_values_for_small_views_need_their_number():
    with pytest.raises(
        UsageError, match=r"one for each of the 2 views, got .*Pass --num_small_views to give small ones values"
    ):
        ViewArguments(blur_prob=[1.0, 0.1, 0.5, 0.5])


def test_the_objectives_number_of_small_views_counts_where_the_user_gave_none():
    given = ViewArguments(crop_scale=[0.14, 1.0])
    assert given.resolved(6) == ViewArguments(crop_scale=[0.14, 1.0], num_small_views=6)
    assert given.resolved(0).num_small_views == 0
    assert given.num_small_views is None


@pytest.mark.parametrize("own", [0, 4])
def test_the_users_number_of_small_views_counts_where_given(own):
    given = ViewArguments(num_small_views=own)
    assert given.resolved(6) == given
    assert given.resolved(6) is not given


def test_small_views_take_the_crops_interpolation_and_statistics():
    settings = ImageSettings(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bicubic")
    recipe = ViewArguments(num_small_views=1, small_image_size=16, **PLAIN)
    views = ViewTransform(recipe, settings)
    white = DecodedImage(np.full((64, 64, 3), 255, np.uint8))
    finished = views.photometry(*stacked([views(white, seed=0, epoch=0, sample_id=0)]))
    assert torch.equal(finished[2], torch.full((1, 3, 16, 16), 2.0))
    assert [own.interpolation for own in views.recipes] == ["bicubic"] * 3


def test_a_batch_holds_each_view_in_its_size_and_its_own_colors():
    views = transform(blur_prob=[0.5], solarize_prob=[0.2])
    samples = [views(PHOTO, seed=0, epoch=0, sample_id=sample_id) for sample_id in range(5)]
    finished = views.photometry(*stacked(samples))
    assert [tuple(view.shape) for view in finished] == [(5, 3, 32, 32)] * 2 + [(5, 3, 16, 16)] * 6
    for index, sample in enumerate(samples):
        alone = views.photometry(*stacked([sample]))
        assert all(torch.equal(finished[place][index], alone[place][0]) for place in range(8))
