"""CIFAR-10's archive, from a local stand-in for its site."""

import hashlib
import tarfile

import pytest

from uvit_fast.data.download import download_cifar10
from uvit_fast.runtime.errors import UserError


def test_cifar10_is_checked_unpacked_and_fetched_once(tmp_path):
    source = tmp_path / "cifar-10-batches-py"
    source.mkdir()
    (source / "data_batch_5").write_text("five")
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=source.name)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()

    with pytest.raises(UserError, match="expected sha256 0000, got"):
        download_cifar10(tmp_path / "out", archive.as_uri(), "0000")
    assert list((tmp_path / "out").iterdir()) == []
    folder = download_cifar10(tmp_path / "out", archive.as_uri(), digest)
    assert (folder / "data_batch_5").read_text() == "five"
    archive.unlink()
    assert download_cifar10(tmp_path / "out", archive.as_uri(), digest) == folder
    with pytest.raises(UserError, match="could not be fetched"):
        download_cifar10(tmp_path / "other", archive.as_uri(), digest)
