"""Whatever lies in a file: a data set or a checkpoint, or one line that says what is wrong."""

import gzip
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import DataError
from datasets.mnist import read_idx
from engine.checkpoint import load_checkpoint, seal
from engine.errors import UserError

settings.register_profile("quick", max_examples=300, deadline=None, database=None, derandomize=True)
settings.load_profile("quick")

numbers = st.one_of(st.integers(0, 40), st.sampled_from([28, 0x7FFFFFFF, 0xFFFFFFFF]))
headers = st.builds(
    lambda magic, sizes: magic + np.array(sizes, ">u4").tobytes(),
    st.one_of(st.sampled_from([b"\0\0\x08\x01", b"\0\0\x08\x03"]), st.binary(max_size=4)),
    st.lists(numbers, max_size=4),
)
almost_idx = st.builds(
    lambda header, length, more: header + bytes(length) + more,
    headers,
    st.sampled_from([0, 1, 784, 785, 2 * 784, 40 * 784]),
    st.binary(max_size=40),
)


def damaged(content, place, byte):
    """`content` with one byte changed, or cut off there."""
    place %= len(content) + 1
    return content[:place] if byte is None else content[:place] + bytes([byte]) + content[place + 1 :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@given(
    content=st.one_of(st.binary(max_size=200), almost_idx),
    gz=st.booleans(),
    place=st.integers(0, 2000),
    byte=st.one_of(st.none(), st.integers(0, 255)),
    shape=st.sampled_from([(), (28, 28)]),
)
def test_the_idx_reader_reads_or_says_what_is_wrong(folder, content, gz, place, byte, shape):
    path = folder / ("fuzzed.gz" if gz else "fuzzed")
    (folder / ("fuzzed" if gz else "fuzzed.gz")).unlink(missing_ok=True)
    path.write_bytes(damaged(gzip.compress(content, mtime=0), place, byte) if gz else content)
    try:
        items = read_idx(folder, "fuzzed", shape, most=40)
    except DataError as error:
        line = str(error)
    else:
        line = str(path)
        assert items.dtype == torch.uint8
        assert items.shape[1:] == shape
        assert 1 <= len(items) <= 40
    assert str(path) in line
    assert len(line.splitlines()) == 1


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_subnormal=False), st.text(), st.just(torch.zeros(2))
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=5,
)


@given(
    content=st.one_of(st.binary(max_size=300), values.map(saved)),
    place=st.integers(0, 5000),
    byte=st.one_of(st.none(), st.integers(0, 255)),
    sealed=st.booleans(),
)
def test_the_checkpoint_reader_says_what_is_wrong(folder, content, place, byte, sealed):
    """Sealed: somebody has put a matching SHA-256 under what is not a checkpoint, so that torch.load sees it."""
    path = folder / "checkpoint.pt"
    content = damaged(content, place, byte)
    path.write_bytes(seal(content) if sealed else content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
