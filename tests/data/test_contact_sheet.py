import numpy as np
import pytest
from data.image_files import encoded, map_source, stream_source
from PIL import Image

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.contact_sheet import write_contact_sheet
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.views import ViewTransform

RECIPE = ViewArguments(num_small_views=2, small_image_size=8)


def sheet(source, path, **options):
    dataset = ViewDataset(source, ViewTransform(RECIPE, ImageSettings(size=16)), seed=0)
    return np.asarray(Image.open(write_contact_sheet(dataset, path, **options)).convert("RGB"))


def test_the_sheet_shows_images_in_rows_and_views_in_columns(tmp_path):
    source = map_source(encoded(6))
    wide = sheet(source, tmp_path / "new" / "views.png", num_images=2)
    tall = sheet(source, tmp_path / "tall.png", num_images=6)
    assert tall.shape[1] == wide.shape[1]
    assert tall.shape[0] > 2 * wide.shape[0]
    assert len(np.unique(wide.reshape(-1, 3), axis=0)) > 500


def test_a_stream_gives_the_sheet_of_the_same_images_map_style(tmp_path):
    images = encoded(9)
    streamed = sheet(stream_source(tmp_path / "shards", images, [4, 5]), tmp_path / "a.png", num_images=5)
    assert np.array_equal(streamed, sheet(map_source(images), tmp_path / "b.png", num_images=5))


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_an_image_that_cannot_be_read_is_shown_as_replaced(tmp_path, kind):
    images, none = encoded(4, {1}), encoded(4)
    sources = (
        map(map_source, (images, none))
        if kind == "map"
        else (stream_source(tmp_path / name, own, [4]) for name, own in (("one", images), ("none", none)))
    )
    broken, whole = (sheet(own, tmp_path / f"{n}.png", num_images=2) for n, own in enumerate(sources))
    assert not np.array_equal(broken, whole)


@pytest.mark.parametrize("more", [3, 100])
def test_fewer_images_than_rows_make_a_shorter_sheet(tmp_path, more):
    few = sheet(map_source(encoded(3)), tmp_path / "few.png", num_images=more)
    assert np.array_equal(few, sheet(map_source(encoded(3)), tmp_path / "three.png", num_images=3))
