import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.collator import collate_views
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8))
SETTINGS = ImageSettings(size=32)
PLAIN = {"flip_prob": 0.0, "jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": [0.0], "solarize_prob": [0.0]}


def transform(**recipe):
    return ViewTransform(ViewArguments(**{"num_small_views": 6, "small_image_size": 16} | recipe), SETTINGS)


def draw(seed=0, epoch=0, sample_id=0, image=PHOTO, **recipe):
    return transform(**recipe)(image, seed=seed, epoch=epoch, sample_id=sample_id)


def position_image(side):
    """Red grows along the rows, green along the columns: a crop shows where it was taken."""
    ramp = np.linspace(0, 255, side).round().astype(np.uint8)
    columns, rows = np.broadcast_to(ramp, (side, side)), np.broadcast_to(ramp[:, None], (side, side))
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(columns)], axis=-1))


def crop_sides(view):
    """Height and width of a crop of `position_image`, as shares of the image, from the inner half of the view."""
    size = view.shape[-1]
    first, last = size // 4, size - 1 - size // 4
    share = size / (last - first)
    red, green = view[0].mean(dim=0), view[1].mean(dim=1)
    return (green[last] - green[first]).item() * share, (red[last] - red[first]).item() * share


def test_large_views_come_first_and_then_the_small_ones():
    assert [tuple(view.shape) for view in draw()] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 6
    sizes = [view.shape[-1] for view in draw(num_views=3, num_small_views=1, blur_prob=[0.5], solarize_prob=[0.1])]
    assert sizes == [32, 32, 32, 16]


@pytest.mark.parametrize("num_small_views", [None, 0])
def test_without_small_views_there_are_only_large_ones(num_small_views):
    assert [view.shape[-1] for view in draw(num_small_views=num_small_views)] == [32, 32]


@pytest.mark.parametrize("num_views", [2, 3])
def test_small_views_leave_the_large_ones_bit_for_bit_as_they_are(num_views):
    recipe = {"num_views": num_views, "blur_prob": [0.5], "solarize_prob": [0.3], "rotation_degrees": 10.0}
    for sample_id in range(10):
        alone = draw(sample_id=sample_id, num_small_views=0, **recipe)
        together = draw(sample_id=sample_id, num_small_views=2, **recipe)
        assert len(alone) == num_views
        assert all(map(torch.equal, alone, together[:num_views]))


def test_more_small_views_leave_the_earlier_ones_as_they_are():
    assert all(map(torch.equal, draw(num_small_views=2), draw(num_small_views=6)[:4]))


def test_the_same_draw_gives_the_same_views_in_any_order():
    views = transform()
    forward = [views(PHOTO, seed=0, epoch=1, sample_id=index) for index in range(4)]
    backward = [views(PHOTO, seed=0, epoch=1, sample_id=index) for index in reversed(range(4))]
    for first, second in zip(forward, reversed(backward), strict=True):
        assert all(map(torch.equal, first, second))


def test_no_two_small_views_of_any_draw_are_the_same():
    views = [view for sample_id in range(20) for epoch in range(2) for view in draw(0, epoch, sample_id)[2:]]
    assert len({view.numpy().tobytes() for view in views}) == 240


def crop_shares(views):
    sides = torch.tensor([crop_sides(view) for view in views])
    return sides.prod(dim=1), sides[:, 1] / sides[:, 0]


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.14), (0.3, 0.4)])
def test_areas_of_small_crops_spread_evenly_over_their_range(low, high):
    image, recipe = position_image(256), PLAIN | {"crop_scale": [0.9, 1.0], "small_crop_scale": [low, high]}
    settings = ImageSettings(size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    views = ViewTransform(ViewArguments(num_small_views=6, small_image_size=32, **recipe), settings)
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


def blur_kernels(views):
    return [
        step.transforms[0].kernel_size
        for pipeline in views.pipelines
        for step in pipeline.transforms[3:]
        if isinstance(step, v2.RandomApply)
    ]


def test_blur_kernels_go_by_the_size_of_the_view():
    views = transform(num_small_views=2, image_size=224, small_image_size=96, blur_prob=[0.5], jitter_prob=0.0)
    assert blur_kernels(views) == [23, 23, 9, 9]


def probabilities(views, kind):
    """Probability of a step in each view, 0 where it is left out."""
    return [
        next((step.p for step in pipeline.transforms if isinstance(step, kind)), 0.0) for pipeline in views.pipelines
    ]


@pytest.mark.parametrize(
    ("given", "of_each"),
    [
        ([0.25], [0.25, 0.25, 0.25, 0.25]),
        ([0.0, 0.5], [0.0, 0.5, 0.5, 0.5]),
        ([0.0, 0.5, 0.25, 0.75], [0.0, 0.5, 0.25, 0.75]),
    ],
)
def test_a_list_holds_one_value_or_one_a_large_view_or_one_a_view(given, of_each):
    views = transform(num_small_views=2, solarize_prob=given, blur_prob=given, jitter_prob=0.0)
    assert probabilities(views, v2.RandomSolarize) == of_each
    assert probabilities(views, v2.RandomApply) == of_each


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
    white = ViewTransform(recipe, settings)(Image.new("RGB", (64, 64), "white"), seed=0, epoch=0, sample_id=0)[2]
    assert torch.equal(white, torch.full((3, 16, 16), 2.0))
    crops = [pipeline.transforms[0].interpolation.value for pipeline in ViewTransform(recipe, settings).pipelines]
    assert crops == ["bicubic"] * 3


def test_a_batch_holds_each_view_in_its_size_over_the_samples():
    samples = [draw(sample_id=sample_id) for sample_id in range(5)]
    views = collate_views(samples)["views"]
    assert [tuple(view.shape) for view in views] == [(5, 3, 32, 32)] * 2 + [(5, 3, 16, 16)] * 6
    assert all(torch.equal(views[place][index], samples[index][place]) for place in range(8) for index in range(5))
