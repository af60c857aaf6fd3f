"""Mini-batches, binarised images and distortions."""

import math

import pytest
import torch
from test_loop import numbered_images

from datasets import Batches, binarise, distort, load


def order(batches, epoch, start=0):
    return torch.cat([torch.empty(0, dtype=torch.int64), *batches.rows(epoch, start)]).tolist()


def test_order_depends_on_seed_and_epoch_alone():
    before = torch.get_rng_state()
    first = order(numbered_images(100, 8, seed=3), epoch=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert order(numbered_images(100, 32, seed=3), 5) == first
    orders = [order(numbered_images(100, 8, seed=seed), epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(each) for each in orders}) == 16


@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_from_a_start_are_the_tail_of_the_epoch(shuffle):
    batches = numbered_images(50, 8, shuffle=shuffle)
    whole = order(batches, 2)
    assert (whole == list(range(50))) is not shuffle
    for start in range(len(batches) + 1):
        assert order(batches, 2, start) == whole[8 * start :]


@pytest.mark.parametrize(("n", "sizes"), [(20, [8, 8, 4]), (16, [8, 8]), (7, [7])])
def test_every_image_comes_once_with_its_label_and_the_last_batch_is_short(n, sizes):
    batches = numbered_images(n, 8, black=0)
    epoch = [batches.take(rows) for rows in batches.rows(0)]
    assert [len(labels) for _, labels in epoch] == sizes
    assert len(batches) == len(sizes)
    assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == list(range(n))
    for images, labels in epoch:
        assert images.shape == (len(labels), 1, 1, 1)
        assert images.dtype == torch.float32
        torch.testing.assert_close(255 * images, labels.float().view(-1, 1, 1, 1).expand_as(images))


@pytest.mark.parametrize("black", [-1.0, 0.3])
def test_a_black_pixel_becomes_black_and_a_white_one_1(black):
    images, _ = numbered_images(256, 8, black=black).take(torch.arange(256))
    torch.testing.assert_close(images[:, 0, 0, 0], torch.linspace(black, 1, 256), rtol=0, atol=1e-6)


def test_a_step_that_changes_its_batch_leaves_the_dataset_unchanged():
    batches = numbered_images(20, 8)
    for part in batches.take(torch.arange(20)):
        part.zero_()
    images, labels = batches.take(torch.arange(20))
    assert torch.equal(labels, torch.arange(20))
    assert images.mean() > -1


def test_pixel_means_are_those_of_all_images():
    images = torch.randint(0, 256, (300, 1, 3, 3), dtype=torch.uint8)
    means = Batches(images, torch.arange(300), 7, "cpu").pixel_means()
    torch.testing.assert_close(means, images.float().mean(0) / 255)


def test_a_pixel_is_white_with_the_probability_of_its_grey_value():
    grey = torch.tensor([0, 64, 128, 200, 255], dtype=torch.uint8).expand(2400, 1, 28, 5)
    white = binarise(grey, seed=0)
    assert white.dtype == torch.uint8
    assert white.unique().tolist() == [0, 255]
    rates = (white == 255).float().mean((0, 1, 2))
    assert rates[[0, -1]].tolist() == [0, 1]
    torch.testing.assert_close(rates, grey[0, 0, 0] / 255, rtol=0, atol=0.01)
    assert not torch.equal(white[:1000], white[1000:2000])  # computed in blocks, each from other random numbers


def test_a_seed_names_the_same_binarised_images_on_every_machine():
    grey = torch.full((1, 1, 1, 12), 128, dtype=torch.uint8)
    torch.rand(7)
    assert (binarise(grey, seed=1) // 255).flatten().tolist() == [0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0]
    assert not torch.equal(binarise(grey, seed=1), binarise(grey, seed=2))


STILL = {"degrees": 0, "scale": 0, "shear": 0, "shift": 0}


def origins(**limits):
    """Where the pixels of 2,000 images come from when distorted: x and y [N, 28, 28] in pixels."""
    ramp = torch.arange(28.0).expand(2000, 1, 28, 28)
    found = []
    for coordinate in (ramp, ramp.transpose(2, 3)):
        torch.manual_seed(0)
        found.append(distort(coordinate, **{**STILL, **limits}).squeeze(1))
    return found


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 20, 24)])
def test_distort_keeps_the_shape_and_without_limits_the_image(shape):
    images = torch.rand(shape)
    before = images.clone()
    assert distort(images, elastic=1).shape == shape
    assert torch.equal(images, before)
    torch.testing.assert_close(distort(images, **STILL), images, rtol=0, atol=1e-4)


def slope(coordinate, down):
    """By how much a coordinate changes from pixel to pixel to the right, or down, about the middle; [N]."""
    ends = (coordinate[:, 18, 13], coordinate[:, 9, 13]) if down else (coordinate[:, 13, 18], coordinate[:, 13, 9])
    return (ends[0] - ends[1]) / 9


@pytest.mark.parametrize(
    ("limits", "measure", "limit"),
    [
        ({"shift": 3}, lambda x, y: [x[:, 13, 13] - 13, y[:, 13, 13] - 13], 3),
        ({"degrees": 20}, lambda x, y: [torch.atan2(slope(y, False), slope(x, False)).rad2deg()], 20),
        ({"scale": 0.2}, lambda x, y: [slope(x, False) - 1, slope(y, True) - 1], 0.2),
        ({"shear": 15}, lambda x, y: [slope(x, True)], math.tan(math.radians(15))),
    ],
)
def test_each_map_is_random_up_to_its_limit(limits, measure, limit):
    values = measure(*origins(**limits))
    for each in values:  # the whole range, evenly to both sides
        assert each.abs().max() <= limit * 1.001 + 1e-4
        assert each.max() > 0.98 * limit
        assert each.min() < -0.98 * limit
        assert each.abs().mean() == pytest.approx(limit / 2, rel=0.1)
    if len(values) == 2:  # width and height, or across and down, are independent
        assert torch.corrcoef(torch.stack(values))[0, 1].item() == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("black", [-1.0, 0.3])
def test_background_stays_at_the_value_of_black(black):
    images = torch.full((100, 1, 28, 28), black)
    images[:, :, 10:18, 10:18] = 1.0
    distorted = distort(images)
    torch.testing.assert_close(distorted[:, :, :3], torch.full((100, 1, 3, 28), black))
    torch.testing.assert_close(distorted.amax((1, 2, 3)), torch.ones(100), rtol=0, atol=0.05)
    assert distorted.min() >= black - 1e-5


def test_elastic_bends_the_image_smoothly_by_up_to_that_many_pixels():
    x, y = origins(elastic=2)
    x, y = x[:, 6:-6, 6:-6] - torch.arange(6.0, 22), y[:, 6:-6, 6:-6] - torch.arange(6.0, 22).view(-1, 1)
    for moved in (x, y):
        assert moved.abs().max() <= 2.001
        assert moved.std() > 0.5
        assert moved.mean().abs() < 0.02
        for dim in (1, 2):
            assert moved.diff(dim=dim).abs().max() <= 4 / 6.75 + 1e-3  # from -2 to 2 between neighbours of the grid
        assert (moved[:, 0, 0] * moved[:, -1, -1]).mean().abs() < 0.1  # not the image as a whole
    assert (x * y).mean().abs() < 0.05


def test_each_image_is_distorted_in_its_own_way_by_torchs_seed():
    images, results = load("digits", "")[0][:1].float().expand(8, 1, 28, 28), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(distort(images))
    assert torch.equal(results[0], results[1])
    assert torch.pdist(torch.cat(results[1:]).flatten(1)).min() > 100
