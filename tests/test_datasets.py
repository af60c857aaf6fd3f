"""datasets/: from files (whole, damaged, downloaded) to batches and distorted images."""

import gzip
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_one_line
from torchvision import datasets as tv

from datasets import DATASETS, DataError, load
from datasets.mnist import MIRRORS, SHA256, find_idx

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FILES = [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS]
PUBLISHED = dict(MIRRORS)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The mirrors are a closed local port."""
    monkeypatch.setenv("no_proxy", "*")
    for folder in MIRRORS:
        monkeypatch.setitem(MIRRORS, folder, ["http://127.0.0.1:1/"])


def idx(array):
    """The IDX file of a uint8 array."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_fake(folder, gz=False, train=5, test=3):
    """Write a tiny data set of random images and labels to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part, n in (("train", train), ("t10k", test)):
        images, labels = random.integers(0, 256, (n, 28, 28), np.uint8), random.integers(0, 10, n, np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if gz:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))


@pytest.fixture
def unpinned(monkeypatch):
    """Fashion-MNIST and KMNIST are read whatever their SHA-256, raw or gzipped: the other checks' turn."""
    for name in list(SHA256):
        if name.endswith(".gz"):
            monkeypatch.delitem(SHA256, name)


@pytest.fixture
def fake(tmp_path, unpinned):
    """A tiny Fashion-MNIST, raw: the folder of its four files. `tmp_path` is its --data-dir."""
    write_fake(tmp_path / "FashionMNIST" / "raw")
    return tmp_path / "FashionMNIST" / "raw"


def error_of(name, data_dir, train=True):
    """The message of the DataError that loading raises: one line."""
    with pytest.raises(DataError) as caught:
        load(name, data_dir, train)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() or path.name.startswith("."))


# Digits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "count"), [(True, 1437), (False, 360)])
def test_digits_look_like_mnist(train, count):
    images, labels = load("digits", "unused", train)
    assert images.shape == (count, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.shape == (count,)
    assert labels.dtype == torch.int64
    assert sorted(labels.unique().tolist()) == list(range(10))
    assert (images.min(), images.max()) == (0, 255)
    assert not F.pad(images[:, :, 4:-4, 4:-4], (4, 4, 4, 4)).ne(images).any()  # the border of 4 pixels is empty


def test_digits_are_scikit_learns_in_its_order():
    from sklearn.datasets import load_digits

    originals = load_digits()
    images, labels = (torch.cat(pair) for pair in zip(load("digits", "", True), load("digits", "", False), strict=True))
    assert labels.tolist() == originals.target.tolist()
    small = F.adaptive_avg_pool2d(images[:, :, 4:-4, 4:-4].float(), 8).flatten()
    assert np.corrcoef(small, originals.images.flatten())[0, 1] > 0.95  # upside down: 0.6


def nearest_mean_accuracy(name, data_dir):
    (images, labels), (test_images, test_labels) = load(name, data_dir, True), load(name, data_dir, False)
    means = torch.stack([images[labels == digit].float().mean(0).flatten() for digit in range(10)])
    guesses = torch.cdist(test_images.float().flatten(1), means).argmin(1)
    return (guesses == test_labels).float().mean()


def test_labels_of_digits_belong_to_the_images():
    assert nearest_mean_accuracy("digits", "") > 0.8


# MNIST ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw_mnist(data_dir, tmp_path_factory):
    """The same MNIST as in data_dir, unpacked: another --data-dir."""
    root = tmp_path_factory.mktemp("raw")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for name in FILES:
        source = find_idx(data_dir, f"MNIST/raw/{name}")
        content = source.read_bytes()
        (root / "MNIST" / "raw" / name).write_bytes(gzip.decompress(content) if source.suffix == ".gz" else content)
    return root


@pytest.fixture(scope="module")
def gzipped_mnist(raw_mnist, tmp_path_factory):
    """A folder with MNIST's four files as a server has them."""
    folder = tmp_path_factory.mktemp("gzipped")
    for name in FILES:
        (folder / f"{name}.gz").write_bytes(gzip.compress((raw_mnist / "MNIST" / "raw" / name).read_bytes(), 1))
    return folder


@pytest.mark.parametrize(("train", "count", "zeros", "ones"), [(True, 60_000, 5923, 6742), (False, 10_000, 980, 1135)])
def test_mnist_is_whole_gzipped_and_raw(data_dir, raw_mnist, train, count, zeros, ones):
    images, labels = load("mnist", data_dir, train)
    assert images.shape == (count, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.shape == (count,)
    assert labels.dtype == torch.int64
    assert (labels == 0).sum() == zeros
    assert (labels == 1).sum() == ones
    if train:  # the mean and deviation that everyone normalises with
        assert images.float().mean() / 255 == pytest.approx(0.1307, abs=5e-5)
        assert images.float().std() / 255 == pytest.approx(0.3081, abs=5e-5)
    raw_images, raw_labels = load("mnist", raw_mnist, train)
    assert torch.equal(raw_images, images)
    assert torch.equal(raw_labels, labels)


def test_mnist_is_what_torchvision_reads(raw_mnist):
    images, labels = load("mnist", raw_mnist, train=False)
    reference = tv.MNIST(raw_mnist, train=False)
    assert torch.equal(images.squeeze(1), reference.data)
    assert torch.equal(labels, reference.targets)


def test_labels_of_mnist_belong_to_the_images(data_dir):
    assert nearest_mean_accuracy("mnist", data_dir) > 0.8


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_each_set_has_a_folder_of_its_own(tmp_path, name, folder):
    assert name in DATASETS
    assert str(tmp_path / folder / "raw") in error_of(name, tmp_path)


@pytest.mark.parametrize("gz", [False, True])
def test_one_part_is_enough_to_read_that_part(tmp_path, unpinned, gz):
    write_fake(tmp_path / "KMNIST" / "raw", gz)
    for path in (tmp_path / "KMNIST" / "raw").glob("train*"):
        path.unlink()
    assert len(load("kmnist", tmp_path, train=False)[0]) == 3


def test_raw_file_comes_before_a_gzipped_one(fake, tmp_path):
    (fake / f"{TRAIN_IMAGES}.gz").write_bytes(b"damaged")
    assert len(load("fashion-mnist", tmp_path)[0]) == 5


def test_reading_changes_nothing_in_a_read_only_folder(fake, tmp_path):
    folders = [fake, fake.parent, tmp_path]
    for folder in folders:
        folder.chmod(0o555)
    before = [(folder.stat().st_mtime_ns, sorted(folder.iterdir())) for folder in folders]
    assert len(load("fashion-mnist", tmp_path)[0]) == 5
    assert [(folder.stat().st_mtime_ns, sorted(folder.iterdir())) for folder in folders] == before


# Damaged files --------------------------------------------------------------------------------------------------------


def with_bytes(start, new):
    return lambda content: content[:start] + new + content[start + len(new) :]


DAMAGE = {
    "cut short": (TRAIN_IMAGES, lambda content: content[:-1]),
    "cut in the header": (TRAIN_IMAGES, lambda content: content[:9]),
    "empty": (TRAIN_LABELS, lambda content: b""),
    "too long": (TRAIN_LABELS, lambda content: content + b"\0"),
    "wrong magic": (TRAIN_IMAGES, with_bytes(2, b"\x0d")),
    "labels magic": (TRAIN_IMAGES, with_bytes(3, b"\x01")),
    "promises 4 billion": (TRAIN_IMAGES, with_bytes(4, b"\xff\xff\xff\xff")),
    "promises nothing": (TRAIN_LABELS, lambda content: content[:4] + bytes(4)),
    "27 rows": (TRAIN_IMAGES, with_bytes(11, b"\x1b")),
    "label above 9": (TRAIN_LABELS, with_bytes(10, b"\x0a")),
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named_with_a_remedy(fake, tmp_path, damage, gz):
    name, spoil = DAMAGE[damage]
    path, content = fake / name, spoil((fake / name).read_bytes())
    path.unlink()
    path = path.with_name(name + ".gz") if gz else path
    path.write_bytes(gzip.compress(content) if gz else content)
    message = error_of("fashion-mnist", tmp_path)
    assert str(path) in message
    assert "delete it" in message


GZ_DAMAGE = {
    "cut short": lambda content: content[:-12],
    "empty": lambda content: b"",
    "no gzip": lambda content: b"<html>" + content,
    "no deflate": with_bytes(10, b"\x07"),
    "altered": lambda content: with_bytes(len(content) // 2, bytes([content[len(content) // 2] ^ 1]))(content),
    "wrong CRC": lambda content: with_bytes(len(content) - 8, b"\0\0\0\0")(content),
    "more after its end": lambda content: content + b"more",
}


@pytest.mark.parametrize("damage", GZ_DAMAGE)
def test_damaged_gzip_is_named_with_a_remedy(tmp_path, unpinned, damage):
    write_fake(tmp_path / "FashionMNIST" / "raw", gz=True)
    path = tmp_path / "FashionMNIST" / "raw" / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(GZ_DAMAGE[damage](path.read_bytes()))
    message = error_of("fashion-mnist", tmp_path)
    assert str(path) in message
    assert "delete it" in message


def test_images_and_labels_of_different_number_are_both_named(fake, tmp_path):
    (fake / TRAIN_LABELS).write_bytes(idx(np.zeros(4, np.uint8)))
    message = error_of("fashion-mnist", tmp_path)
    assert str(fake / TRAIN_IMAGES) in message
    assert TRAIN_LABELS in message
    assert "delete both" in message


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", [TEST_IMAGES, TEST_LABELS])
def test_one_altered_byte_in_mnist_is_noticed(raw_mnist, tmp_path, name, gz):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for test_file in (TEST_IMAGES, TEST_LABELS):
        shutil.copy(raw_mnist / "MNIST" / "raw" / test_file, raw)
    content = bytearray((raw / name).read_bytes())
    content[5000] ^= 1  # still a pixel, still a label
    (raw / name).unlink()
    path = raw / (f"{name}.gz" if gz else name)
    path.write_bytes(gzip.compress(content, 1) if gz else content)
    message = error_of("mnist", tmp_path, train=False)
    assert str(path) in message
    assert "delete it" in message
    assert "SHA-256" in message


@pytest.mark.parametrize("gz", [False, True])
def test_never_unpacks_more_than_the_header_promises(fake, tmp_path, gz):
    path, bomb = fake / TRAIN_IMAGES, (fake / TRAIN_IMAGES).read_bytes() + bytes(100_000_000)
    path.unlink()
    path = path.with_name(f"{TRAIN_IMAGES}.gz") if gz else path
    path.write_bytes(gzip.compress(bomb, 1) if gz else bomb)
    del bomb
    tracemalloc.start()
    message = error_of("fashion-mnist", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in message
    assert peak < 10_000_000


@pytest.mark.parametrize("online", [False, True])
def test_folder_in_a_files_place_is_named(fake, tmp_path, serve, online):
    (fake / TRAIN_LABELS).unlink()
    (fake / TRAIN_LABELS).mkdir()
    if online:
        write_fake(tmp_path / "server", gz=True)
        serve(tmp_path / "server", tv.FashionMNIST, pin=False)
    message = error_of("fashion-mnist", tmp_path)
    assert str(fake / TRAIN_LABELS) in message
    assert "--data-dir" in message


# Download -------------------------------------------------------------------------------------------------------------


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class BreakingHandler(QuietHandler):
    """Breaks off in the middle of each file, as a server that fails on the way does."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"FF\r\nonly the beginning")


class SilentHandler(QuietHandler):
    """Takes the question and says nothing."""

    def do_GET(self):
        time.sleep(5)


@pytest.fixture
def serve(monkeypatch):
    """serve(folder, dataset): `dataset` comes from `folder`, and is published with the sums that its files have now."""
    servers = []

    def start(folder, dataset, handler=QuietHandler, pin=True):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        names = [f"{name}.gz" for name in FILES]
        sums = [hashlib.md5((folder / name).read_bytes()).hexdigest() for name in names]
        monkeypatch.setitem(MIRRORS, dataset.__name__, [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(dataset, "resources", list(zip(names, sums, strict=True)))
        for name in names if pin and dataset is not tv.MNIST else []:
            sha256 = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            monkeypatch.setitem(SHA256, f"{dataset.__name__}/raw/{name}", sha256)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_missing_mnist_is_downloaded_into_four_raw_files(gzipped_mnist, raw_mnist, tmp_path, serve):
    serve(gzipped_mnist, tv.MNIST)
    images, labels = load("mnist", tmp_path / "new" / "data", train=False)
    assert len(images) == len(labels) == 10_000
    assert files_below(tmp_path) == sorted(FILES)
    for name in FILES:
        downloaded = tmp_path / "new" / "data" / "MNIST" / "raw" / name
        assert downloaded.read_bytes() == (raw_mnist / "MNIST" / "raw" / name).read_bytes()


@pytest.mark.parametrize(("name", "dataset"), [("fashion-mnist", tv.FashionMNIST), ("kmnist", tv.KMNIST)])
def test_relatives_are_downloaded_too(tmp_path, serve, name, dataset):
    write_fake(tmp_path / "server", gz=True)
    serve(tmp_path / "server", dataset)
    assert len(load(name, tmp_path / "data")[0]) == 5
    assert files_below(tmp_path / "data") == sorted(f"{file}.gz" for file in FILES)


def test_downloads_go_over_https_and_are_pinned():
    for folder, mirrors in PUBLISHED.items():
        assert all(mirror.startswith("https://") for mirror in mirrors)
        assert len([name for name in SHA256 if name.startswith(f"{folder}/")]) == 4


def test_what_is_there_already_is_not_replaced_by_a_download(fake, tmp_path, serve):
    write_fake(tmp_path / "server", gz=True)
    serve(tmp_path / "server", tv.FashionMNIST, pin=False)
    (fake / TRAIN_LABELS).unlink()
    (fake / TRAIN_IMAGES).write_bytes(idx(np.full((5, 28, 28), 7, np.uint8)))
    assert load("fashion-mnist", tmp_path)[0].eq(7).all()


def test_download_that_is_not_the_published_mnist_leaves_nothing_behind(gzipped_mnist, tmp_path, serve):
    shutil.copytree(gzipped_mnist, tmp_path / "server")
    labels = bytearray(gzip.decompress((tmp_path / "server" / f"{TEST_LABELS}.gz").read_bytes()))
    labels[5000] ^= 1
    (tmp_path / "server" / f"{TEST_LABELS}.gz").write_bytes(gzip.compress(labels))
    serve(tmp_path / "server", tv.MNIST)  # with an MD5 that fits the altered file
    message = error_of("mnist", tmp_path / "data")
    assert TEST_LABELS in message
    assert "SHA-256" in message
    assert files_below(tmp_path / "data") == []


@pytest.mark.parametrize(("name", "dataset"), [("fashion-mnist", tv.FashionMNIST), ("kmnist", tv.KMNIST)])
def test_download_of_a_relative_that_is_not_the_published_one_leaves_nothing_behind(tmp_path, serve, name, dataset):
    write_fake(tmp_path / "server", gz=True)
    serve(tmp_path / "server", dataset, pin=False)
    assert "SHA-256" in error_of(name, tmp_path / "data")
    assert files_below(tmp_path / "data") == []


def test_an_unpacked_relative_is_not_read_without_its_published_gz(tmp_path):
    write_fake(tmp_path / "KMNIST" / "raw")
    assert f"{TRAIN_IMAGES}.gz is missing" in error_of("kmnist", tmp_path)


def test_a_silent_server_does_not_keep_one_waiting(tmp_path, serve, monkeypatch):
    write_fake(tmp_path / "server", gz=True)
    serve(tmp_path / "server", tv.KMNIST, SilentHandler)
    monkeypatch.setattr("datasets.mnist.TIMEOUT", 0.2)
    assert "timed out" in error_of("kmnist", tmp_path / "data")
    assert files_below(tmp_path / "data") == []


TRAIN = """
import sys
import train_classifier
from datasets import mnist
from engine.errors import run_script
mnist.MIRRORS["MNIST"] = [sys.argv[1]]
run_script(lambda: train_classifier.main(["--data-dir", sys.argv[2], "--output-dir", sys.argv[2] + "/run"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_download_leaves_nothing_behind(tmp_path, serve, number):
    write_fake(tmp_path / "server", gz=True)
    serve(tmp_path / "server", tv.MNIST, SilentHandler)
    command = [sys.executable, "-c", TRAIN, *MIRRORS["MNIST"], tmp_path / "data"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("data/.download-*/MNIST/raw")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert_one_line(errors, "interrupted")
    assert files_below(tmp_path / "data") == []


DOWNLOAD = """
import json, sys
from torchvision.datasets import MNIST
from datasets import mnist
mnist.MIRRORS["MNIST"], MNIST.resources = json.loads(sys.argv[1])
print(len(mnist.load_mnist("mnist", sys.argv[2], train=False)[0]))
"""


def test_two_processes_that_download_into_the_same_folder_leave_one_good_copy(gzipped_mnist, tmp_path, serve):
    serve(gzipped_mnist, tv.MNIST)
    source = json.dumps([MIRRORS["MNIST"], tv.MNIST.resources])
    command = [sys.executable, "-c", DOWNLOAD, source, tmp_path / "data"]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0] for process in processes] == ["10000\n", "10000\n"]
    assert files_below(tmp_path) == sorted(FILES)
    assert len(load("mnist", tmp_path / "data")[0]) == 60_000


def test_download_with_another_md5_leaves_nothing_behind(tmp_path, serve):
    write_fake(tmp_path / "server", gz=True)
    serve(tmp_path / "server", tv.FashionMNIST)
    write_fake(tmp_path / "server", gz=True, test=4)
    assert "could not be downloaded" in error_of("fashion-mnist", tmp_path / "data")
    assert files_below(tmp_path / "data") == []


def test_download_that_breaks_off_leaves_nothing_behind(tmp_path, serve):
    write_fake(tmp_path / "server", gz=True)
    serve(tmp_path / "server", tv.FashionMNIST, BreakingHandler)
    assert "could not be downloaded" in error_of("fashion-mnist", tmp_path / "data")
    assert files_below(tmp_path / "data") == []


def test_no_data_and_no_network_names_the_folder_the_reason_and_the_remedies(tmp_path):
    message = error_of("mnist", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "MNIST" / "raw") in message
    assert "refused" in message
    assert "--data-dir" in message
    assert "--dataset digits" in message
    assert files_below(tmp_path) == []


def test_data_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "data").write_text("a file")
    assert str(tmp_path / "data") in error_of("mnist", tmp_path / "data")


def test_data_dir_that_the_system_refuses_is_named(tmp_path):
    assert "x" * 300 in error_of("mnist", tmp_path / ("x" * 300))  # as one without permission would be
