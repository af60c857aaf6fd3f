"""datasets/: built-in datasets from their files, whole, damaged or downloaded."""

import gzip
import hashlib
import http.server
import os
import signal
import threading
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PROCESSES, ROOT, assert_one_line, run_here

from datasets import DATASETS, hold_out, load, mnist
from datasets.mnist import MIRRORS, SHA256, find_idx
from engine.errors import DataError

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FILES = [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS]
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
PINNED, PUBLISHED = dict(SHA256), dict(MIRRORS)


def idx(*shape):
    """An IDX file of random digits."""
    content = np.random.default_rng(0).integers(0, 10, shape, np.uint8)
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + content.tobytes()


TINY = {  # in place of the published files: five training and three test images
    TRAIN_IMAGES: idx(5, 28, 28), TRAIN_LABELS: idx(5), TEST_IMAGES: idx(3, 28, 28), TEST_LABELS: idx(3),
}  # fmt: skip
TINY_GZ = {name: gzip.compress(content, mtime=0) for name, content in TINY.items()}


def pin_tiny():
    """Let the tiny files be the published ones of all three datasets."""
    for key in PINNED:
        path = Path(key)
        SHA256[key] = hashlib.sha256(TINY_GZ[path.stem] if path.suffix else TINY[path.name]).hexdigest()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The mirrors are a closed local port."""
    monkeypatch.setenv("no_proxy", "*")
    for folder in MIRRORS:
        monkeypatch.setitem(MIRRORS, folder, "http://127.0.0.1:1/")


@pytest.fixture
def tiny(offline):
    pin_tiny()
    yield
    SHA256.update(PINNED)


def write_tiny(root, name, gz):
    """The four tiny files of a dataset; returns their folder."""
    folder = root / FOLDERS[name] / "raw"
    folder.mkdir(parents=True)
    for file in FILES:
        (folder / (f"{file}.gz" if gz else file)).write_bytes((TINY_GZ if gz else TINY)[file])
    return folder


def error_of(name, data_dir, train=True):
    """The message of the DataError that loading raises: one line."""
    with pytest.raises(DataError) as caught:
        load(name, data_dir, train)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() or path.name.startswith("."))


# Whole files ----------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_in_its_order_and_look_like_mnist():
    from sklearn.datasets import load_digits

    originals = load_digits()
    parts = [load("digits", "unused", train) for train in (True, False)]
    assert [len(labels) for _, labels in parts] == [1437, 360]
    images, labels = (torch.cat(pair) for pair in zip(*parts))
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.shape == (1797, 1, 28, 28)
    assert (images.min(), images.max()) == (0, 255)
    assert not F.pad(images[:, :, 4:-4, 4:-4], (4, 4, 4, 4)).ne(images).any()  # the border of 4 pixels is empty
    assert labels.tolist() == originals.target.tolist()
    small = F.adaptive_avg_pool2d(images[:, :, 4:-4, 4:-4].float(), 8).flatten()
    assert np.corrcoef(small, originals.images.flatten())[0, 1] > 0.95  # upside down: 0.6


def test_the_training_images_of_mnist_are_whole(data_dir):
    images, labels = load("mnist", data_dir)
    assert images.shape == (60_000, 1, 28, 28)
    assert labels.bincount()[:2].tolist() == [5923, 6742]
    assert images.float().mean() / 255 == pytest.approx(0.1307, abs=5e-5)  # what everyone normalises with
    assert images.float().std() / 255 == pytest.approx(0.3081, abs=5e-5)


@pytest.mark.parametrize("gz", [False, True])
def test_mnist_is_what_torchvision_reads_raw_and_gzipped(data_dir, tmp_path, gz):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in (TEST_IMAGES, TEST_LABELS):  # one part is enough to read that part
        source = find_idx(data_dir, f"MNIST/raw/{name}")
        content = gzip.decompress(source.read_bytes()) if source.suffix else source.read_bytes()
        (tmp_path / name).write_bytes(content)
        (raw / (f"{name}.gz" if gz else name)).write_bytes(gzip.compress(content, 1) if gz else content)
    images, labels = load("mnist", tmp_path, train=False)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(images.squeeze(1), read_image_file(tmp_path / TEST_IMAGES))
    assert torch.equal(labels, read_label_file(tmp_path / TEST_LABELS))


@pytest.mark.usefixtures("tiny")
def test_reading_prefers_the_raw_file_and_writes_nothing(tmp_path):
    folder = write_tiny(tmp_path, "mnist", gz=False)
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(b"damaged")
    before = [(path.stat().st_mtime_ns, path.name) for path in sorted(tmp_path.rglob("*"))]
    assert len(load("mnist", tmp_path)[0]) == 5
    assert [(path.stat().st_mtime_ns, path.name) for path in sorted(tmp_path.rglob("*"))] == before


@pytest.mark.usefixtures("tiny")
def test_an_unpacked_relative_is_not_read_without_its_published_gz(tmp_path):
    write_tiny(tmp_path, "kmnist", gz=False)
    assert f"{TRAIN_IMAGES}.gz is missing" in error_of("kmnist", tmp_path)


def test_the_last_images_are_held_out():
    images, labels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10)
    for size in (0, 3):
        parts = hold_out(images, labels, size)
        assert [part.flatten().tolist() for pair in parts for part in pair] == [
            *[list(range(10 - size))] * 2, *[list(range(10 - size, 10))] * 2,
        ]  # fmt: skip
    with pytest.raises(DataError, match="--val-size 10 leaves none of the 10 images to train on; lower it"):
        hold_out(images, labels, 10)


# Damaged files --------------------------------------------------------------------------------------------------------


def with_byte(place, change=1):
    return lambda content: content[:place] + bytes([content[place] ^ change]) + content[place:][1:]


DAMAGE = {
    "cut short": lambda content: content[:-1],
    "cut in the header": lambda content: content[:9],
    "empty": lambda content: b"",
    "more after its end": lambda content: content + b"\0more",
    "a web page": lambda content: b"<html>",
    "one bit": with_byte(200),  # still a pixel, still gzip
    "another header": with_byte(2),
    "another CRC": with_byte(-8),
}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "gz"), [("mnist", False), ("mnist", True), ("kmnist", True)])
@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_with_a_remedy(tmp_path, name, gz, spoil):
    folder = write_tiny(tmp_path, name, gz)
    assert len(load(name, tmp_path, train=False)[0]) == 3
    path = folder / (f"{TEST_IMAGES}.gz" if gz else TEST_IMAGES)
    path.write_bytes(spoil(path.read_bytes()))
    message = error_of(name, tmp_path, train=False)
    assert str(path) in message
    assert "delete it to download it again" in message
    assert len(load(name, tmp_path)[0]) == 5  # the training part is whole


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("gz", [False, True])
def test_never_unpacks_more_than_mnist_can_hold(tmp_path, monkeypatch, gz):
    monkeypatch.setattr(mnist, "LARGEST", 10_000)
    folder, bomb = write_tiny(tmp_path, "mnist", gz), bytes(50_000_000)
    (folder / (f"{TRAIN_IMAGES}.gz" if gz else TRAIN_IMAGES)).write_bytes(gzip.compress(bomb, 1) if gz else bomb)
    del bomb
    tracemalloc.start()
    message = error_of("mnist", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert TRAIN_IMAGES in message
    assert peak < 2_000_000


# Download -------------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves the tiny files, without a change."""

    def body(self, name):
        return TINY_GZ[name]

    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.body(Path(self.path).stem)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class AlteredServer(Server):
    """Its test labels are others."""

    def body(self, name):
        return gzip.compress(with_byte(-1)(TINY[name]), mtime=0) if name == TEST_LABELS else TINY_GZ[name]


class BreakingServer(Server):
    """Breaks off in the middle of each file."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"FF\r\nonly the beginning")


class SilentServer(Server):
    """Takes the question and does not answer."""

    def do_GET(self):
        self.server.asked.append(self.path)
        time.sleep(5)


@pytest.fixture
def serve(monkeypatch, tiny):
    """serve(handler): all datasets come from there; returns the list of the paths it is asked for."""
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        for folder in MIRRORS:
            monkeypatch.setitem(MIRRORS, folder, f"http://127.0.0.1:{server.server_port}/")
        return server.asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def downloaded(name):
    return {f"{file}{'.gz' * (name != 'mnist')}": (TINY if name == "mnist" else TINY_GZ)[file] for file in FILES}


@pytest.mark.parametrize("name", FOLDERS)
def test_missing_files_are_downloaded(tmp_path, serve, name):
    """MNIST's are unpacked, as torchvision leaves them."""
    serve(Server)
    root = tmp_path / "new" / "data"
    assert len(load(name, root, train=False)[0]) == 3
    assert {path.name: path.read_bytes() for path in (root / FOLDERS[name] / "raw").iterdir()} == downloaded(name)
    assert files_below(tmp_path) == sorted(downloaded(name))


def test_only_what_is_missing_is_downloaded(tmp_path, serve):
    asked, folder = serve(Server), write_tiny(tmp_path, "mnist", gz=False)
    (folder / TRAIN_LABELS).unlink()
    assert len(load("mnist", tmp_path)[0]) == 5
    assert asked == [f"/{TRAIN_LABELS}.gz"]


def test_downloads_go_over_https_and_are_pinned():
    assert {*PUBLISHED} == {*FOLDERS.values()}
    assert all(mirror.startswith("https://") for mirror in PUBLISHED.values())
    names = {f"{folder}/raw/{file}" for folder in PUBLISHED for file in FILES}
    assert {name.removesuffix(".gz") for name in PINNED} == names
    assert len({*PINNED.values()}) == 12


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (AlteredServer, "SHA-256 differs); try again later"),
        (BreakingServer, "could not be downloaded"),
        (SilentServer, "timed out"),
    ],
)
@pytest.mark.parametrize("name", ["mnist", "kmnist"])
def test_a_failed_download_leaves_only_verified_files(tmp_path, serve, monkeypatch, name, handler, reason):
    serve(handler)
    monkeypatch.setattr(mnist, "TIMEOUT", 0.2)
    assert reason in error_of(name, tmp_path)
    good = [file for file in downloaded(name) if handler is AlteredServer and TEST_LABELS not in file]
    assert files_below(tmp_path) == sorted(good)


def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path, serve, monkeypatch):
    def write_half(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("No space left on device")

    serve(Server)
    monkeypatch.setattr(Path, "write_bytes", write_half)
    assert "No space left" in error_of("mnist", tmp_path)
    assert files_below(tmp_path) == []


def closed_mirror(address):
    """Called in a process of the test's own."""
    pin_tiny()
    MIRRORS["MNIST"] = address


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_download_leaves_nothing_behind(tmp_path, serve, number):
    asked, flags = serve(SilentServer), ["--data-dir", "data", "--device", "cpu"]
    arguments = (tmp_path, tmp_path / "output", tmp_path / "errors", partial(closed_mirror, MIRRORS["MNIST"]))
    process = PROCESSES.Process(target=run_here, args=(str(ROOT / "train_classifier.py"), flags, *arguments))
    process.start()
    deadline = time.monotonic() + 60
    while not asked and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert_one_line((tmp_path / "errors").read_text(), "interrupted")
    assert files_below(tmp_path / "data") == []


def download(address, root):
    closed_mirror(address)
    assert len(load("mnist", root)[0]) == 5


def test_processes_that_download_into_the_same_folder_leave_one_good_copy(tmp_path, serve):
    serve(Server)
    processes = [PROCESSES.Process(target=download, args=(MIRRORS["MNIST"], tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert files_below(tmp_path) == sorted(FILES)
    assert len(load("mnist", tmp_path)[0]) == 5


@pytest.mark.parametrize("name", FOLDERS)
def test_no_data_and_no_network_names_the_folder_the_reason_and_the_remedies(tmp_path, name):
    assert name in DATASETS
    message = error_of(name, tmp_path / "nowhere")
    for part in (tmp_path / "nowhere" / FOLDERS[name] / "raw", "refused", "--data-dir", "--dataset digits"):
        assert str(part) in message
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("online", [False, True])
def test_a_folder_in_a_files_place_is_named(tmp_path, serve, online):
    if online:
        serve(Server)
    folder = write_tiny(tmp_path, "mnist", gz=False)
    (folder / TRAIN_LABELS).unlink()
    (folder / TRAIN_LABELS).mkdir()
    message = error_of("mnist", tmp_path)
    assert str(folder / TRAIN_LABELS) in message
    assert "--data-dir" in message


@pytest.mark.parametrize("name", ["a file", "x" * 300])
def test_a_data_dir_that_cannot_be_one_is_named(tmp_path, name):
    """A file, or a name that the system refuses, as it does one without permission."""
    (tmp_path / "a file").write_text("")
    assert name in error_of("mnist", tmp_path / name)
