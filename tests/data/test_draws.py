import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision import transforms

from e2mc_hf.data.draws import Colors, Place, ViewRecipe, draw_view, uniforms
from e2mc_hf.data.geometry import Crop

INTEGERS = st.integers(-(2**63), 2**63 - 1)
RECIPE = ViewRecipe(
    size=32,
    interpolation="bilinear",
    crop_scale=(0.08, 1.0),
    flip_prob=0.5,
    rotation_degrees=15.0,
    jitter_prob=0.8,
    jitter_strength=(0.4, 0.4, 0.2, 0.1),
    grayscale_prob=0.2,
    blur_prob=0.5,
    blur_sigma=(0.1, 2.0),
    solarize_prob=0.3,
)
SIZE = (90, 70)


def recipe(**changes):
    return ViewRecipe(**(RECIPE.__dict__ | changes))


def draws(count, size=SIZE, **changes):
    own = recipe(**changes)
    return [draw_view(own, uniforms(0, 0, sample_id, 0, Place.END).tolist(), size) for sample_id in range(count)]


def test_the_numbers_of_a_view_never_change():
    numbers = uniforms(0, 1, 2, 3, 17)
    expected = [0.012751757109732642, 0.717334547769359, 0.08720055376479674]
    assert numbers[[0, 8, 16]].tolist() == expected


def test_the_draw_of_a_view_never_changes():
    crop, flip, angle, colors = draws(2)[1]
    assert (crop, flip) == (Crop(10, 30, 54, 54), True)
    factors = [1.2257481285468343, 0.7716935198928421, 0.8689206137090953, 0.01754984851522537]
    assert [angle, *colors] == pytest.approx([4.386494068543147, 8.0, *factors, 0.0, 0.0, 0.0])


def test_every_parameter_has_a_place_of_its_own():
    assert sorted(Place.__members__.values()) == [*range(13), 12 + 40]


@given(INTEGERS, INTEGERS, INTEGERS, INTEGERS, st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=50)
def test_fewer_numbers_are_the_beginning_of_more(seed, epoch, sample_id, view, first, second):
    fewer, more = (uniforms(seed, epoch, sample_id, view, count) for count in sorted((first, second)))
    assert np.array_equal(fewer, more[: len(fewer)])
    assert ((more >= 0) & (more < 1)).all()


def test_of_ten_thousand_views_no_two_share_a_number():
    keys = [(seed, epoch, sample, view) for seed in range(2) for epoch in range(5) for sample in range(250)
            for view in range(4)]  # fmt: skip
    numbers = np.stack([uniforms(*key, Place.END) for key in keys])
    assert len(keys) == 10_000
    assert len(np.unique(numbers)) == numbers.size == 10_000 * Place.END
    assert len({draw_view(RECIPE, row, SIZE) for row in numbers.tolist()}) == 10_000


def test_neighbors_of_a_view_share_no_number():
    """Seeds, epochs, ranks' sample ids and views that are swapped, shifted or large do not lead to the same numbers."""
    large = [2**31, 2**32, 2**53, 2**63 - 1]
    keys = {tuple(int(part) for part in key) for key in np.ndindex(3, 3, 3, 3)}
    keys |= {tuple(value if place == own else 0 for place in range(4)) for value in large for own in range(4)}
    numbers = np.concatenate([uniforms(*key, 8) for key in sorted(keys)])
    assert len(np.unique(numbers)) == len(numbers)


def test_numbers_are_uniform_and_independent_of_their_neighbors():
    numbers = np.stack([uniforms(0, epoch, sample, 0, Place.END) for epoch in range(5) for sample in range(800)])
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(numbers.T) - np.eye(Place.END)).max() < 0.08
    assert np.abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize(
    ("left_out", "field"),
    [
        ({"jitter_prob": 0.0}, {"jitter_order", "brightness", "contrast", "saturation", "hue"}),
        ({"jitter_strength": (0.0, 0.4, 0.2, 0.1)}, {"brightness"}),
        ({"grayscale_prob": 0.0}, {"grayscale"}),
        ({"blur_prob": 0.0}, {"blur_sigma"}),
        ({"solarize_prob": 0.0}, {"solarize"}),
        ({"flip_prob": 0.0}, set()),
        ({"rotation_degrees": 0.0}, set()),
        ({"crop_scale": (0.5, 0.6)}, set()),
    ],
)
def test_a_step_left_out_changes_no_other_draw(left_out, field):
    for with_all, without in zip(draws(50), draws(50, **left_out), strict=True):
        assert with_all.crop == without.crop or "crop_scale" in left_out
        assert with_all.flip == without.flip or "flip_prob" in left_out
        assert with_all.angle == without.angle or "rotation_degrees" in left_out
        kept = [name for name in Colors._fields if name not in field]
        assert [getattr(with_all.colors, name) for name in kept] == [getattr(without.colors, name) for name in kept]
        neutral = Colors()
        assert all(getattr(without.colors, name) == getattr(neutral, name) for name in field)


@pytest.mark.parametrize(
    ("happened", "prob"),
    [
        (lambda draw: draw.flip, 0.5),
        (lambda draw: draw.colors.hue != 0, 0.8),
        (lambda draw: draw.colors.grayscale == 1, 0.2),
        (lambda draw: draw.colors.blur_sigma > 0, 0.5),
        (lambda draw: draw.colors.solarize == 1, 0.3),
    ],
)
def test_a_step_happens_as_often_as_the_recipe_says(happened, prob):
    times = sum(map(happened, draws(4000)))
    assert stats.binomtest(times, 4000, prob).pvalue > 1e-3


@pytest.mark.parametrize("certain", [0.0, 1.0])
def test_probabilities_zero_and_one_are_certain(certain):
    names = ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob")
    for draw in draws(300, **dict.fromkeys(names, certain)):
        colors = draw.colors
        steps = (draw.flip, colors.hue != 0, colors.grayscale, colors.blur_sigma > 0, colors.solarize)
        assert [float(step) for step in steps] == [certain] * 5


@pytest.mark.parametrize("strength", [(0.4, 0.4, 0.2, 0.1), (0.8, 0.8, 0.8, 0.2), (1.5, 0.0, 2.0, 0.5)])
def test_jitter_is_distributed_as_torchvisions(strength):
    own = [draw.colors for draw in draws(3000, jitter_prob=1.0, jitter_strength=strength)]
    jitter = transforms.ColorJitter(*strength)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [transforms.ColorJitter.get_params(*ranges) for _ in range(3000)]
    for place, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        if ranges[place] is None:
            assert {getattr(colors, name) for colors in own} == {1.0}
            continue
        values = [getattr(colors, name) for colors in own]
        assert stats.ks_2samp(values, [params[1 + place] for params in theirs]).pvalue > 1e-3


def test_the_24_orders_of_jitter_are_equally_likely_and_independent_of_its_strength():
    colors = [draw.colors for draw in draws(6000, jitter_prob=1.0)]
    orders = np.array([own.jitter_order for own in colors])
    assert stats.chisquare(np.bincount(orders.astype(int), minlength=24)).pvalue > 1e-3
    assert len(np.unique(orders)) == 24
    assert abs(np.corrcoef(orders, [own.brightness for own in colors])[0, 1]) < 0.05


def test_blur_and_rotation_are_uniform_over_their_ranges():
    own = draws(3000, blur_prob=1.0)
    sigmas = [draw.colors.blur_sigma for draw in own]
    assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    angles = [draw.angle for draw in own]
    theirs = [transforms.RandomRotation.get_params([-15.0, 15.0]) for _ in range(3000)]
    assert stats.ks_2samp(angles, theirs).pvalue > 1e-3
    assert draws(1, rotation_degrees=0.0)[0].angle == 0
