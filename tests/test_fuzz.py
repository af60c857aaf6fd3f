"""Whatever lies in a file: a dataset or a checkpoint, or one line that says what is wrong."""

import gzip
import hashlib
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.mnist import SHA256, read_idx
from engine.checkpoint import load_checkpoint, seal
from engine.errors import DataError, UserError

settings.register_profile("quick", max_examples=150, deadline=None, database=None, derandomize=True)
settings.load_profile("quick")

STEM, CONTENT = "MNIST/raw/t10k-labels-idx1-ubyte", bytes([0, 0, 8, 1, 0, 0, 0, 200]) + bytes(range(10)) * 20
damage = {"place": st.integers(0, 2000), "byte": st.one_of(st.none(), st.integers(0, 255))}


def damaged(content, place, byte):
    """`content` with one byte changed, or cut off there."""
    place %= len(content) + 1
    return content[:place] if byte is None else content[:place] + bytes([byte]) + content[place + 1 :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@given(other=st.one_of(st.none(), st.binary(max_size=200)), gz=st.booleans(), **damage)
def test_the_idx_reader_reads_the_published_content_or_says_what_is_wrong(folder, other, gz, place, byte):
    path = folder / (f"{STEM}.gz" if gz else STEM)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("", ".gz"):
        (folder / f"{STEM}{suffix}").unlink(missing_ok=True)
    content = CONTENT if other is None else other
    path.write_bytes(damaged(gzip.compress(content, mtime=0) if gz else content, place, byte))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHA256, STEM, hashlib.sha256(CONTENT).hexdigest())
        try:
            read = bytes(read_idx(folder, STEM).tolist())
        except DataError as error:
            read, line = None, str(error)
    if read is None:
        assert str(path) in line
        assert len(line.splitlines()) == 1
    else:
        assert read == CONTENT


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


@given(content=st.one_of(st.binary(max_size=300), values.map(saved)), sealed=st.booleans(), **damage)
def test_the_checkpoint_reader_says_what_is_wrong(folder, content, sealed, place, byte):
    """Sealed: somebody has put a matching SHA-256 under what is not a checkpoint, so that torch.load sees it."""
    path = folder / "checkpoint.pt"
    content = damaged(content, place, byte)
    path.write_bytes(seal(content) if sealed else content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
