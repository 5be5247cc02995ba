import numpy as np
import pytest
from PIL import Image

from jaxnets import errors
from jaxnets.data import Dataset, ImageFolder, ImageFolders, open_images
from jaxnets.data.image_folder import read_image


def paint(path, size=(8, 8), colour=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    paint(tmp_path / "pets" / "train" / "dog" / "b.png", colour=(2, 0, 0))
    paint(tmp_path / "pets" / "train" / "dog" / "a.jpg", colour=(200, 0, 0))
    paint(tmp_path / "pets" / "train" / "cat" / "z.PNG", colour=(3, 0, 0))
    paint(tmp_path / "pets" / "test" / "dog" / "c.png", colour=(4, 0, 0))
    (tmp_path / "pets" / "train" / ".DS_Store").write_bytes(b"")
    (tmp_path / "pets" / "train" / "dog" / ".hidden.png").write_bytes(b"")
    (tmp_path / "pets" / "train" / "dog" / "readme.txt").write_text("no image")
    return tmp_path / "pets"


def test_classes_and_images_in_the_order_of_their_names(folder):
    source = ImageFolder(folder / "train", size=4)
    assert source.class_names == ("cat", "dog")
    assert [int(source[i]["label"]) for i in range(len(source))] == [0, 1, 1]
    assert source[0]["image"].tolist() == [[[3, 0, 0]] * 4] * 4
    assert source[1]["image"][0, 0, 0] > 150  # a.jpg before b.png
    assert source[2]["image"][0, 0, 0] == 2
    for i in range(3):
        assert (source[i]["image"].dtype, source[i]["image"].shape) == (np.uint8, (4, 4, 3))
        assert source[i]["label"].dtype == np.int32


def test_both_parts_number_their_classes_alike(folder):
    """The test part lacks the first class."""
    images = open_images("pets", size=4, data_dir=folder.parent)
    assert isinstance(images, ImageFolders)
    assert (images.num_classes, images.num_train, images.image_shape) == (2, 3, (4, 4, 3))
    assert images.test[0]["label"] == 1
    paint(folder / "test" / "emu" / "a.png")
    with pytest.raises(errors.DataError, match="no such class in the training part: emu"):
        open_images("pets", size=4, data_dir=folder.parent)


def test_other_sets_come_as_they_did(tmp_path):
    assert isinstance(open_images("digits", size=4, data_dir=tmp_path), Dataset)
    for name in ("nowhere", "../pets", ".."):
        with pytest.raises(errors.ConfigError):
            open_images(name, size=4, data_dir=tmp_path)


def test_strict_verification_refuses_them(folder):
    with pytest.raises(errors.DataError, match="nothing is known to verify it by"):
        open_images("pets", size=4, data_dir=folder.parent, verify="strict")


def test_the_middle_is_cut_out_after_the_shorter_side_fits(tmp_path):
    image_HWC = np.zeros((8, 24, 3), np.uint8)
    image_HWC[:, 8:16] = 200
    Image.fromarray(image_HWC).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", (8, 8, 3)) == 200).all()
    assert read_image(tmp_path / "wide.png", (8, 24, 3)).tolist() == image_HWC.tolist()
    small = read_image(tmp_path / "wide.png", (4, 4, 3))
    assert (small[:, 1:3] == 200).all()
    assert read_image(tmp_path / "wide.png", (16, 48, 3)).shape == (16, 48, 3)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
def test_modes_become_colour_or_grey(tmp_path, mode):
    path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
    paint(path, colour=(255, 255, 255), mode=mode)
    assert (read_image(path, (8, 8, 3)) > 250).all()
    assert (read_image(path, (8, 8, 1)) > 250).all()


def test_grey_by_choice(folder):
    source = ImageFolder(folder / "train", size=(4, 6), channels=1)
    assert source.image_shape == source[0]["image"].shape == (4, 6, 1)


def test_images_that_cannot_be_read_are_named(tmp_path):
    paint(tmp_path / "good.png", size=(64, 64))
    content = (tmp_path / "good.png").read_bytes()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    for name, wrong, message in [
        ("cut.png", content[: len(content) // 2], "can't be read as an image"),
        ("flipped.png", content[:40] + b"\xff" * 40 + content[80:], "can't be read as an image"),
        ("empty.jpg", b"", "can't be read as an image"),
        ("text.jpg", b"hello", "can't be read as an image"),
        ("deep.png", (tmp_path / "deep.png").read_bytes(), "more than 8 bits"),
    ]:
        (tmp_path / name).write_bytes(wrong)
        with pytest.raises(errors.DataError, match=f"{name}: .*{message}") as caught:
            read_image(tmp_path / name, (8, 8, 3))
        assert "\n" not in str(caught.value)
    with pytest.raises(errors.DataError, match=r"gone\.png: can't be read"):
        read_image(tmp_path / "gone.png", (8, 8, 3))


def test_folders_that_hold_no_set(tmp_path):
    for folder, make, message in [
        ("gone", lambda f: None, r"gone: can't be read \(No such file"),
        ("empty", lambda f: f.mkdir(), "has 0 class folders, expected two or more"),
        ("flat", lambda f: paint(f / "a.png"), "has 0 class folders"),
        ("one", lambda f: paint(f / "cat" / "a.png"), "has 1 class folders"),
    ]:
        make(tmp_path / folder)
        with pytest.raises(errors.DataError, match=message):
            ImageFolder(tmp_path / folder, size=8)
    paint(tmp_path / "two" / "cat" / "a.png")
    (tmp_path / "two" / "dog").mkdir()
    with pytest.raises(errors.DataError, match=r"two/dog: holds no images \(\.png"):
        ImageFolder(tmp_path / "two", size=8)
    with pytest.raises(errors.DataError, match="holds no images"):
        ImageFolder(tmp_path / "empty", size=8, class_names=["cat", "dog"])
    for size, channels in [(0, 3), ((4, -1), 3), (4, 2)]:
        with pytest.raises(errors.ConfigError, match="can't be"):
            ImageFolder(tmp_path / "two", size=size, channels=channels)
