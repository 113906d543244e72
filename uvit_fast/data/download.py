"""Datasets that can be downloaded."""

import hashlib
import shutil
import tarfile
import urllib.request
from pathlib import Path

from uvit_fast.runtime.errors import UserError

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"


def download_cifar10(out: Path, url: str = CIFAR10, sha256: str = CIFAR10_SHA256) -> Path:
    """Download CIFAR-10's Python version, verify it, and unpack it into `out`; return the folder of its batches.

    Raises:
        UserError: no connection, or an unexpected file.
    """
    folder = out / "cifar-10-batches-py"
    if (folder / "data_batch_5").is_file():
        return folder
    out.mkdir(parents=True, exist_ok=True)
    archive, unpacked = out / "cifar-10-python.tar.gz.tmp", out / "cifar-10.tmp"
    try:
        with urllib.request.urlopen(url, timeout=60) as source, open(archive, "wb") as file:
            shutil.copyfileobj(source, file)
        with open(archive, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            raise UserError(f"{url}: expected sha256 {sha256}, got {digest}; download it again")
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        (unpacked / folder.name).rename(folder)
    except OSError as error:  # URLError is one
        raise UserError(f"{url}: could not be fetched into {out} ({error})") from None
    finally:
        archive.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)
    return folder
