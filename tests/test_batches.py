"""Mini-batches and their distortions."""

import numpy as np
import pytest
import torch
from torchvision import transforms

from datasets import Batches, DataError, distort, load

# Batches --------------------------------------------------------------------------------------------------------------


def numbered(n, **options):
    """Batches of `n` images, the i-th of them filled with i and labelled i."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 28, 28)
    return Batches(images, torch.arange(n), **{"batch_size": 8, "device": "cpu", **options})


def order(batches, epoch, start=0):
    return [label for _, labels in batches.epoch(epoch, start) for label in labels.tolist()]


def test_order_depends_on_seed_and_epoch_alone():
    first = order(numbered(100, seed=3), epoch=5)
    used = numbered(100, seed=3, batch_size=32)
    for epoch in (4, 5, 6):
        torch.rand(epoch)
        order(used, epoch)
    assert order(used, 5) == first
    orders = [order(numbered(100, seed=seed), epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(each) for each in orders}) == 16


def test_order_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    order(numbered(100), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shuffle", [False, True])
def test_epoch_from_a_start_is_the_tail_of_the_epoch(shuffle):
    batches = numbered(50, shuffle=shuffle)
    whole = list(batches.epoch(2))
    for start in range(len(batches) + 1):
        tail = list(batches.epoch(2, start))
        assert len(tail) == len(batches) - start
        for (images, labels), (whole_images, whole_labels) in zip(tail, whole[start:], strict=True):
            assert torch.equal(images, whole_images)
            assert torch.equal(labels, whole_labels)


@pytest.mark.parametrize(("n", "sizes"), [(20, [8, 8, 4]), (16, [8, 8]), (7, [7]), (17, [8, 8, 1])])
def test_every_image_comes_once_with_its_label_and_the_last_batch_is_short(n, sizes):
    batches = numbered(n, black=0)
    epoch = list(batches.epoch(0))
    assert [len(labels) for _, labels in epoch] == sizes
    assert len(batches) == len(sizes)
    assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == list(range(n))
    for images, labels in epoch:
        assert images.shape == (len(labels), 1, 28, 28)
        assert images.dtype == torch.float32
        torch.testing.assert_close(255 * images, labels.float().view(-1, 1, 1, 1).expand_as(images))


def test_without_shuffle_the_order_is_kept_and_with_it_not():
    assert order(numbered(100, shuffle=False), 3) == list(range(100))
    assert order(numbered(100), 3) != list(range(100))


@pytest.mark.parametrize("black", [-1.0, 0.0, 0.3])
def test_a_black_pixel_becomes_black_and_a_white_one_1(black):
    ((images, _),) = numbered(256, batch_size=256, shuffle=False, black=black).epoch(0)
    torch.testing.assert_close(images[:, 0, 0, 0], torch.linspace(black, 1, 256), rtol=0, atol=1e-6)


def test_default_range_is_totensor_and_normalize(tmp_path):
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    expected = torch.stack([reference(image.squeeze(0).numpy()) for image in images])
    ((ours, _),) = Batches(images, torch.zeros(4, dtype=torch.int64), 4, "cpu", shuffle=False).epoch(0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_batches_leave_the_data_unchanged():
    batches = numbered(20)
    before = batches.images.clone()
    for images, labels in batches.epoch(0):
        images.zero_()
        labels.zero_()
    assert torch.equal(batches.images, before)
    assert order(batches, 0) == order(numbered(20), 0)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.rand(4, 1, 28, 28), torch.arange(4), r"must be uint8 .* not torch.float32; convert them"),
        (torch.zeros(4, 28, 28, dtype=torch.uint8), torch.arange(4), r"\[4, 28, 28\]"),
        (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.arange(5), r"\[5\]"),
        (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.zeros(4), r"labels must be whole numbers"),
    ],
)
def test_images_and_labels_of_another_kind_are_refused(images, labels, words):
    with pytest.raises(DataError, match=words):
        Batches(images, labels, 2, "cpu")


# Distortions ----------------------------------------------------------------------------------------------------------

STILL = {"degrees": 0, "scale": 0, "shear": 0, "shift": 0}


def origins(**limits):
    """Where the pixels of 2,000 images come from when distorted: x and y [N, 28, 28] in pixels."""
    ramp = torch.arange(28.0).expand(2000, 1, 28, 28)
    found = []
    for coordinate in (ramp, ramp.transpose(2, 3)):
        torch.manual_seed(0)
        found.append(distort(coordinate, **{**STILL, **limits}).squeeze(1))
    return found


def assert_fills(values, limit):
    """The values lie within ±limit and use that range, evenly to both sides."""
    assert values.abs().max() <= limit * 1.001 + 1e-4
    assert values.max() > 0.98 * limit
    assert values.min() < -0.98 * limit
    assert values.abs().mean() == pytest.approx(limit / 2, rel=0.1)


def test_distort_without_limits_changes_nothing():
    images = torch.rand(5, 1, 28, 28)
    torch.testing.assert_close(distort(images, **STILL), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (1, 1, 28, 28), (2, 3, 20, 24)])
def test_distort_keeps_shape_and_type_and_leaves_the_input_alone(shape):
    images = torch.rand(shape)
    before = images.clone()
    distorted = distort(images)
    assert distorted.shape == shape
    assert distorted.dtype == images.dtype
    assert torch.equal(images, before)


def test_shift_moves_the_whole_image_by_up_to_that_many_pixels():
    x, y = origins(shift=3)
    for moved in (x[:, 6:-6, 6:-6] - torch.arange(6.0, 22), y[:, 6:-6, 6:-6] - torch.arange(6.0, 22).view(-1, 1)):
        assert (moved - moved[:, :1, :1]).abs().max() < 1e-3
        assert_fills(moved[:, 0, 0], 3)
    assert np.corrcoef(x[:, 13, 13], y[:, 13, 13])[0, 1] == pytest.approx(0, abs=0.1)


def test_degrees_turn_the_image_by_up_to_that_angle():
    x, y = origins(degrees=20)
    along, across = (x[:, 13, 18] - x[:, 13, 9]) / 9, (y[:, 13, 18] - y[:, 13, 9]) / 9
    torch.testing.assert_close(along**2 + across**2, torch.ones(2000), rtol=0, atol=1e-3)
    assert_fills(torch.atan2(across, along).rad2deg(), 20)


def test_scale_stretches_width_and_height_apart_by_up_to_that_share():
    x, y = origins(scale=0.2)
    width, height = (x[:, 13, 18] - x[:, 13, 9]) / 9 - 1, (y[:, 18, 13] - y[:, 9, 13]) / 9 - 1
    assert_fills(width, 0.2)
    assert_fills(height, 0.2)
    assert np.corrcoef(width, height)[0, 1] == pytest.approx(0, abs=0.1)


def test_shear_slants_by_up_to_that_angle():
    x, y = origins(shear=15)
    assert_fills((x[:, 18, 13] - x[:, 9, 13]) / 9, np.tan(np.radians(15)))
    torch.testing.assert_close(y[:, :, 13], torch.arange(28.0).expand(2000, 28), rtol=0, atol=1e-3)


@pytest.mark.parametrize("black", [-1.0, 0.0, 0.3])
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


def test_each_image_is_distorted_in_its_own_way():
    distorted = distort(load("digits", "")[0][:1].float().expand(8, 1, 28, 28))
    distances = torch.cdist(distorted.flatten(1), distorted.flatten(1))
    assert (distances + 1e9 * torch.eye(8)).min() > 100


def test_distortions_follow_torchs_seed():
    images, results = torch.rand(4, 1, 28, 28), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(distort(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
