"""Others' networks: what was downloaded is used without asking, and a hub that does not answer is said at once."""

import time

import pytest

from uvit_fast.data.encoders import load_pretrained
from uvit_fast.runtime.errors import UserError


def loader(cached):
    """A from_pretrained that notes how it was asked."""
    asked = []

    def load(local_files_only):
        asked.append(local_files_only)
        if local_files_only and not cached:
            raise OSError("no such file\nand more")
        return "network"

    return load, asked


def test_what_was_downloaded_before_asks_nobody(monkeypatch):
    monkeypatch.setattr("uvit_fast.data.encoders._hub_answers", lambda: pytest.fail("asked the hub"))
    load, asked = loader(cached=True)
    assert load_pretrained("autoencoder", "owner/name", load) == "network" and asked == [True]


def test_what_was_not_is_fetched_where_the_hub_answers(monkeypatch):
    monkeypatch.setattr("uvit_fast.data.encoders._hub_answers", lambda: True)
    load, asked = loader(cached=False)
    assert load_pretrained("autoencoder", "owner/name", load) == "network" and asked == [True, False]


def test_without_a_network_it_says_so_at_once(monkeypatch):
    """The hub's own client would try six times a file, half a minute each."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:1")  # nobody listens
    load, asked = loader(cached=False)
    before = time.monotonic()
    with pytest.raises(UserError, match="text encoder owner/name: .*the hub cannot be reached"):
        load_pretrained("text encoder", "owner/name", load)
    assert asked == [True] and time.monotonic() - before < 5
