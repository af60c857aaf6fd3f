"""datasets/: built-in datasets from their files, whole, damaged or downloaded."""

import gzip
import hashlib
import http.server
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, PROCESSES, train
from helpers import load as load_run

import datasets
from datasets import hold_out, load, mnist
from datasets.mnist import FOLDERS, MIRRORS, SHA256, find_idx
from engine.errors import DataError

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FILES = [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS]
PINNED, PUBLISHED = dict(SHA256), dict(MIRRORS)


def idx(*shape):
    """An IDX file of random digits."""
    content = np.random.default_rng(0).integers(0, 10, shape, np.uint8)
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + content.tobytes()


TINY = {  # in place of the published files: five training and three test images
    TRAIN_IMAGES: idx(5, 28, 28), TRAIN_LABELS: idx(5), TEST_IMAGES: idx(3, 28, 28), TEST_LABELS: idx(3),
}  # fmt: skip
TINY_GZ = {name: gzip.compress(content, mtime=0) for name, content in TINY.items()}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The mirrors are a closed local port."""
    monkeypatch.setenv("no_proxy", "*")
    for folder in MIRRORS:
        monkeypatch.setitem(MIRRORS, folder, "http://127.0.0.1:1/")


def pin_tiny(address=None):
    """Let the tiny files be the published ones of all three datasets, and be at this address."""
    for key in PINNED:
        path = Path(key)
        SHA256[key] = hashlib.sha256(TINY_GZ[path.stem] if path.suffix else TINY[path.name]).hexdigest()
    MIRRORS.update(dict.fromkeys(MIRRORS, address) if address else {})


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


def test_a_run_on_digits_resumes_on_a_processor_that_rounds_a_pixel_otherwise(tmp_path, monkeypatch):
    images, labels = datasets.load_digits(True)
    train(*DIGITS, "--model", "mlp", "--epochs", 1, "--output-dir", tmp_path / "run")
    images[0, 0, 14, 14] ^= 1
    monkeypatch.setattr(datasets, "load_digits", lambda train: (images, labels))
    train("--resume", tmp_path / "run", "--epochs", 2)
    assert load_run(tmp_path / "run" / "checkpoint.pt")["epoch"] == 2


def test_mnist_is_what_torchvision_reads(data_dir, tmp_path):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in (TEST_IMAGES, TEST_LABELS):  # one part is enough to read that part
        source = find_idx(data_dir, f"MNIST/raw/{name}")
        content = gzip.decompress(source.read_bytes()) if source.suffix else source.read_bytes()
        (raw / name).write_bytes(content)
    images, labels = load("mnist", tmp_path, train=False)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert torch.equal(images.squeeze(1), read_image_file(raw / TEST_IMAGES))
    assert torch.equal(labels, read_label_file(raw / TEST_LABELS))


@pytest.mark.usefixtures("tiny")
def test_an_unpacked_file_is_preferred_if_it_can_be_verified(tmp_path, capsys):
    folder = write_tiny(tmp_path, "mnist", gz=False)
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(b"damaged")
    assert len(load("mnist", tmp_path)[0]) == 5
    write_tiny(tmp_path, "kmnist", gz=False)
    assert f"{TRAIN_IMAGES}.gz is missing" in error_of("kmnist", tmp_path)
    assert f"{TRAIN_IMAGES} is not read, because only the published {TRAIN_IMAGES}.gz can" in capsys.readouterr().out


LAYOUTS = {  # where people have the files, and how they are called there
    "dots": lambda name: f"MNIST/raw/{name.replace('-idx', '.idx')}",
    "dots, side by side": lambda name: name.replace("-idx", ".idx"),
    "gzipped, side by side": lambda name: f"{name}.gz",
    "in MNIST, mixed": lambda name: f"MNIST/{name.replace('-idx', '.idx')}{'.gz' * ('labels' in name)}",
    "in raw, mixed": lambda name: f"raw/{name}{'.gz' * ('train' in name)}",
    "in several folders": lambda name: f"MNIST/raw/{name}" if "labels" in name else f"{name}.gz",
}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_files_are_found_as_people_have_them(tmp_path, layout, monkeypatch):
    for name in FILES:
        path = tmp_path / layout(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((TINY_GZ if path.suffix == ".gz" else TINY)[name])
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert [len(load("mnist", root, train)[0]) for root, train in ((tmp_path, True), ("~", False))] == [5, 3]


@pytest.mark.usefixtures("tiny")
def test_the_files_of_another_dataset_are_named_and_not_to_be_deleted(tmp_path):
    for name in FILES:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(TINY[name] + b"of another"))
    message = error_of("kmnist", tmp_path)
    assert f"{tmp_path / TRAIN_IMAGES}.gz is not the published file" in message
    assert "move it elsewhere, or use another --data-dir" in message


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
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("name", "gz"), [("mnist", False), ("mnist", True), ("kmnist", True)])
@pytest.mark.parametrize("spoil", [lambda x: x[:-1], lambda x: x + b"more", lambda x: x[:200] + b"\x55" + x[201:]])
def test_a_damaged_file_is_named_with_a_remedy(tmp_path, name, gz, spoil):
    path = write_tiny(tmp_path, name, gz) / (f"{TEST_IMAGES}.gz" if gz else TEST_IMAGES)
    path.write_bytes(spoil(path.read_bytes()))
    message = error_of(name, tmp_path, train=False)
    assert str(path) in message
    assert "delete it to download it again" in message
    assert len(load(name, tmp_path)[0]) == 5  # the training part is whole


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("gz", [False, True])
def test_never_unpacks_more_than_mnist_can_hold(tmp_path, monkeypatch, gz):
    monkeypatch.setattr(mnist, "LARGEST", 10_000)
    folder, bomb = write_tiny(tmp_path, "mnist", gz), bytes(5_000_000)
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
    """Serves the tiny files: as they are, with other test labels, broken off, or only after some seconds."""

    def do_GET(self):
        name, how = Path(self.path).stem, self.server.how
        self.server.asked.append(self.path)
        if how == "silent":
            time.sleep(5)
            return
        body = gzip.compress(idx(4)) if how == "altered" and name == TEST_LABELS else TINY_GZ[name]
        self.send_response(200)
        self.send_header(*(("Transfer-Encoding", "chunked") if how == "broken" else ("Content-Length", str(len(body)))))
        self.end_headers()
        self.wfile.write(b"FF\r\nonly the beginning" if how == "broken" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tiny):
    """All datasets come from there. how: in which way; asked: the paths that it was asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.how, server.asked = "whole", []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    MIRRORS.update(dict.fromkeys(MIRRORS, f"http://127.0.0.1:{server.server_port}/"))  # `offline` restores them
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_missing_is_downloaded(tmp_path, server, name):
    """MNIST's files are unpacked, as torchvision leaves them."""
    root = tmp_path / "new" / "data"
    assert len(load(name, root, train=False)[0]) == 3
    folder = root / FOLDERS[name] / "raw"
    downloaded = TINY if name == "mnist" else {f"{file}.gz": content for file, content in TINY_GZ.items()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == downloaded
    assert files_below(tmp_path) == sorted(downloaded)
    server.asked.clear()
    next(folder.glob(f"{TRAIN_LABELS}*")).unlink()
    assert len(load(name, root)[0]) == 5
    assert server.asked == [f"/{TRAIN_LABELS}.gz"]


def test_downloads_go_over_https_and_are_pinned():
    assert {*PUBLISHED} == {*FOLDERS.values()}
    assert all(mirror.startswith("https://") for mirror in PUBLISHED.values())
    names = {f"{folder}/raw/{file}" for folder in PUBLISHED for file in FILES}
    assert {name.removesuffix(".gz") for name in PINNED} == names
    assert len({*PINNED.values()}) == 12


def write_half(path, content):
    """As on a full disk."""
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    ("how", "reason"),
    [("altered", "SHA-256 differs); try again later"), ("broken", "not be downloaded"), ("silent", "timed out"),
     ("no space", "No space left")],
)  # fmt: skip
def test_a_failed_download_leaves_only_verified_files(tmp_path, server, monkeypatch, how, reason):
    server.how = how
    if how == "no space":
        monkeypatch.setattr(Path, "write_bytes", write_half)
    monkeypatch.setattr(mnist, "TIMEOUT", 0.2)
    assert reason in error_of("mnist", tmp_path)
    good = [file for file in FILES if how == "altered" and file != TEST_LABELS]
    assert files_below(tmp_path) == sorted(good)


def download(address, root):
    """Called in a process of its own."""
    pin_tiny(address)
    assert len(load("mnist", root)[0]) == 5


@pytest.mark.usefixtures("server")
def test_processes_that_download_into_the_same_folder_leave_one_good_copy(tmp_path):
    processes = [PROCESSES.Process(target=download, args=(MIRRORS["MNIST"], tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert files_below(tmp_path) == sorted(FILES)


@pytest.mark.parametrize("place", ["nowhere", "a file"])
def test_no_data_and_no_network_names_the_folder_the_reason_and_the_remedies(tmp_path, place):
    (tmp_path / "a file").write_text("")
    message = error_of("mnist", tmp_path / place)
    for part in (tmp_path / place / "MNIST" / "raw", "could not be downloaded", "--data-dir", "--dataset digits"):
        assert str(part) in message
    assert files_below(tmp_path) == ["a file"]
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("name", "meant"), [("MNIST", "mnist"), ("Fashion_MNIST", "fashion-mnist")])
def test_a_dataset_that_is_spelt_otherwise_is_named(tmp_path, name, meant):
    (tmp_path / name / "raw").mkdir(parents=True)
    assert error_of(name, tmp_path) == f"there is no dataset {name}; did you mean {meant}?"
