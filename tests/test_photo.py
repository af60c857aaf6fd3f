"""photos/: digits are found whatever else the photo shows, look as MNIST's do, and are unsure where they should be."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import photo as pages
from datasets import load
from engine.errors import DataError, UserError
from evaluate import read_number, read_picture
from measures.trained import load_model
from photos import read as read_file
from photos import reader
from reader import stroke

STROKES = {  # the corners of each stroke, in a box of 20 x 20
    5: [[(15, 1), (6, 1)], [(6, 5), (5, 9), (11, 8), (15, 12), (14, 17), (9, 19), (4, 17)]],  # the bar stands apart
    4: [[(6, 1), (4, 11), (16, 11)], [(12, 3), (12, 19)]],
    3: [[(4, 2), (11, 1), (14, 4), (9, 9), (14, 13), (12, 18), (4, 18)]],
    7: [[(3, 2), (16, 2), (8, 19)]],
}


def draw(digit, size=28, width=2.4):
    """A digit as MNIST has them, uint8 [size, size], white on black."""
    large = Image.new("L", (280, 280))
    for points in STROKES[digit]:
        stroke(large, 40 + 10 * np.array(points), round(10 * width))
    return np.asarray(large.resize((size, size), Image.Resampling.BOX))


@pytest.fixture(scope="module")
def network():
    return load_model("weights/cnn.pt")


@pytest.fixture
def read(network, tmp_path):
    """read(page): the images in a page [H, W] or [H, W, 3], and the number that evaluate.py prints."""

    def read_page(page):
        path = tmp_path / "page.png"
        Image.fromarray(np.asarray(page).clip(0, 255).astype(np.uint8)).save(path)
        reading = read_picture(network, path)
        assert reading.images.dtype == torch.uint8
        assert reading.images.shape[1:] == (1, 28, 28)
        return reading.images, read_number(network, reading)[1]

    return read_page


def paste(*places, shape=(400, 600), size=140):
    """Black digits on a white page; places: (digit, top, left)."""
    page = np.full(shape, 255, np.uint8)
    for digit, top, left in places:
        part = page[top : top + size, left : left + size]
        np.minimum(part, 255 - draw(digit, size), out=part)
    return page


def difference(a, b):
    """Of grey levels, on average."""
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("condition", sorted(pages.CONDITIONS.keys() - {"fold"}))  # of which one in five is not read
def test_digits_are_found_in_every_condition(condition, network, tmp_path):
    digits = [5, 3, 4, 7]
    path, shown = pages.render([draw(digit) for digit in digits], digits, tmp_path, condition, seed=5)[0]
    assert read_number(network, read_picture(network, path))[1] == shown


def test_digits_in_a_row_are_read_from_left_to_right(read):
    images, number = read(paste((4, 40, 20), (5, 70, 160), (7, 30, 300)))
    assert number == "457"
    alone, _ = read(paste((5, 70, 160)))
    assert difference(images[1], alone[0]) < 1


def test_a_speck_or_a_line_that_runs_off_the_picture_changes_nothing(read):
    clean, _ = read(paste((3, 100, 200)))
    for level in (0, 128):
        near_a_corner, beside_the_digit, line = (paste((3, 100, 200)) for _ in range(3))
        near_a_corner[4, 590] = beside_the_digit[150:158, 205:213] = level
        for column in range(380, 600):  # only its first pixels lie on the edge
            row = max(0, (column - 440) // 40)
            line[row : row + 3, column] = 0
        for page in (near_a_corner, beside_the_digit, line):
            assert difference(read(page)[0], clean) < 1


def test_a_shadow_on_one_of_two_digits_hides_neither(read):
    page = 255 - (255 - paste((3, 100, 60), (4, 100, 400)).astype(float)) * 0.3  # in pencil
    page[:, 300:] *= 0.5
    assert read(page)[1] == "34"


@pytest.mark.parametrize(
    "page",
    [paste((4, 20, 20), (5, 240, 300)), paste(*[(3 + i % 3, 60 * (i // 9), 60 * (i % 9)) for i in range(54)], size=60)],
    ids=["below each other", "a page full"],
)
def test_several_rows_are_an_error(page, read):
    with pytest.raises(DataError, match=r"page\.png shows several rows"):
        read(page)


def test_what_is_no_digit_is_unsure_or_an_error(read):
    page = Image.new("L", (400, 400), 255)
    ImageDraw.Draw(page).line([(100, 100), (300, 300), (300, 100), (100, 300), (200, 60), (100, 100)], 0, 15)
    with suppress(DataError):
        assert read(page)[1].endswith("(unsure)")


def test_the_number_is_what_both_networks_find_most_likely():
    page, other = Image.fromarray(paste((7, 100, 200))), torch.full((10,), 0.01)
    own = read_file(page)
    assert own.answer() == ([7], True)
    for of_one, of_seven, sure in ((0.55, 0.34, True), (0.9, 0.05, False)):
        other[[1, 7]] = torch.tensor([of_one, of_seven])
        digits, is_sure = read_file(page, lambda images: other.expand(len(images), 10)).answer()
        assert is_sure is sure
        assert digits == [7] or not sure


def test_the_readers_weights_are_the_pinned_ones(tmp_path, monkeypatch):
    (tmp_path / "reader.npz").write_bytes(reader.WEIGHTS.read_bytes()[:-1] + b"0")
    monkeypatch.setattr(reader, "WEIGHTS", tmp_path / "reader.npz")
    with pytest.raises(UserError, match=r"reader\.npz is missing, or not the file of this repository"):
        reader.load_network.__wrapped__()


def nothing():
    rng = np.random.default_rng(0)
    paper = pages.paint(np.zeros((600, 600)))
    yield "blank", paper
    yield "small and blank", paper[:28, :28]
    yield "noise", 128 + 30 * rng.standard_normal((600, 600, 3))
    yield "random pixels", rng.integers(0, 256, (300, 300))
    yield "grain", paper + pages.grain(rng, 8)
    yield "shade", paper * (0.75 + 0.25 * pages.ramp(rng))[..., None]
    yield "ruled", pages.mix(pages.stripes(30, 2, rng, 0.02), paper, (120, 150, 205))
    yield "specks", np.where(rng.random((600, 600)) < 1e-4, 0, 255)


@pytest.mark.parametrize(("name", "page"), [*nothing()], ids=lambda value: value if isinstance(value, str) else "")
def test_a_page_without_a_digit_is_an_error(name, page, read):
    with pytest.raises(DataError, match=r"page\.png shows no digit"):
        read(page)


@pytest.mark.parametrize("digit", STROKES)
def test_an_image_of_mnists_size_comes_back_nearly_the_same(digit, read):
    images, number = read(paste((digit, 50, 200)))
    again, number_again = read(images[0, 0].numpy())
    assert number == number_again == str(digit)
    assert difference(again, images) < 10


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("digit", [3, 7])
def test_a_digit_that_is_cropped_closely_is_whole(digit, invert, read):
    """Its bars and bows lie along the picture's edge, as a table beside the page does."""
    page = paste((digit, 100, 200), size=240)
    clean, number = read(page)
    rows, columns = (page < 128).any(1).nonzero()[0], (page < 128).any(0).nonzero()[0]
    close = page[rows[0] + 6 : rows[-1] - 5, columns[0] + 6 : columns[-1] - 5]
    images, number_close = read(255 - close if invert else close)
    assert number == number_close == str(digit)
    assert difference(images, clean) < 20


def test_strokes_of_a_thin_pen_are_as_bright_as_others(read):
    page = np.full((400, 600), 255, np.uint8)
    page[100:340, 200:440] = 255 - draw(4, 280, width=0.3)[20:260, 20:260]
    images, number = read(page)
    assert number == "4"
    assert (images > 127).sum() > 40


def test_a_12_megapixel_photo_is_read(tmp_path):
    page = Image.fromarray(paste((4, 100, 200))).resize((4000, 3000))
    for name in ("page.jpg", "page.png"):
        page.save(tmp_path / name)
        assert read_file(tmp_path / name).images.shape == (1, 1, 28, 28)


def test_a_soft_picture_of_a_digit_is_read():
    """An 8x8 digit, enlarged: its outline is wide."""
    images, labels = load("digits", "", train=False)
    for image, label in zip(images[:4], labels[:4].tolist()):
        picture = Image.fromarray(255 - image[0].numpy()).resize((280, 280))
        assert read_file(picture).probabilities.argmax(1).tolist() == [label]
