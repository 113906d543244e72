"""The order of the data: decided by seed and position alone."""

import multiprocessing
import os
import re
import signal
import threading
import time
from multiprocessing.connection import Connection

import psutil
import pytest
import torch

from tests.training.tiny import Points
from uvit_fast.runtime.errors import UserError
from uvit_fast.training import loader
from uvit_fast.training.interrupt import Stalled
from uvit_fast.training.loader import DataError, Order, batches

CPU = torch.device("cpu")


def order(ranks: int = 1, rank: int = 0, position: int = 0, steps: int = 10, micro: int = 8, accumulation: int = 1):
    return Order(50, 3, micro, accumulation, rank, ranks, position, steps)


def flat(batches_of_pairs):
    return [pair for batch in batches_of_pairs for pair in batch]


def test_each_epoch_shows_each_sample_once():
    """80 positions of 50 samples: batches straddle the epochs, nothing is dropped."""
    pairs = flat(order())
    assert sorted(i for i, epoch in pairs if epoch == 0) == list(range(50))
    assert len({i for i, epoch in pairs if epoch == 1}) == 30
    assert [i for i, epoch in pairs if epoch == 0][:30] != [i for i, epoch in pairs if epoch == 1]


def test_continues_from_any_position():
    assert flat(order(position=32, steps=6)) == flat(order())[32:]


@pytest.mark.parametrize("ranks, accumulation", [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_ranks_and_accumulation_share_the_same_stream(ranks, accumulation):
    """A step's batch is the same set of micro-batches, whoever takes them."""
    micro = 8 // (ranks * accumulation)
    shares = [list(order(ranks, rank, micro=micro, accumulation=accumulation)) for rank in range(ranks)]
    merged = [shares[rank][pass_] for pass_ in range(10 * accumulation) for rank in range(ranks)]
    assert flat(merged) == flat(order())


class Broken(Points):
    def __getitems__(self, items):
        raise UserError("photo.png: not a readable image")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_is_one_line_and_ends_the_loader_processes(workers):
    """They outlive a first SIGTERM, which is what an exiting process sends them, and waits."""
    with pytest.raises(DataError) as error:
        next(batches(Broken(), order(), workers, CPU))
    assert str(error.value) == "photo.png: not a readable image"
    assert multiprocessing.active_children() == []


def test_loader_processes_change_nothing():
    one, two = (list(batches(Points(), order(), workers, CPU)) for workers in (0, 2))
    assert len(one) == len(two) == 10
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(one, two))


class Slow(Points):
    def __getitems__(self, items):
        time.sleep(2.5)
        return super().__getitems__(items)


def test_a_stalled_loader_is_named_while_it_stalls_and_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(loader, "STALLED", 1)
    found = list(batches(Slow(), order(steps=1), 1, CPU))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("no batch for 2 s: this waits for the data")
    assert torch.equal(found[0]["x"], next(batches(Points(), order(steps=1), 0, CPU))["x"])


class Stopped(Points):
    """Its process is stopped in the midst of handing over a batch, some of it in the pipe, for a while."""

    def __getitems__(self, items):
        write = Connection._send

        def half(self, buf, *_):
            os.write(self._handle, buf[: len(buf) // 2])
            Connection._send = write
            os.kill(os.getpid(), signal.SIGSTOP)
            write(self, buf[len(buf) // 2 :])

        Connection._send = half
        return super().__getitems__(items)


def test_a_loader_process_that_is_stopped_while_it_hands_over_a_batch_is_named(monkeypatch, capsys):
    monkeypatch.setattr(loader, "STALLED", 1)

    def wake_up():
        while not (
            found := [child for child in psutil.Process().children() if child.status() == psutil.STATUS_STOPPED]
        ):
            time.sleep(0.01)
        time.sleep(2.5)
        for process in found:
            process.resume()

    threading.Thread(target=wake_up).start()
    found = list(batches(Stopped(), order(steps=1), 1, CPU))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and re.search(
        r"no batch for 2 s: .*; loader process (\d+) is stopped: kill -CONT \1$", lines[1]
    )
    assert torch.equal(found[0]["x"], next(batches(Points(), order(steps=1), 0, CPU))["x"])


class Hangs(Points):
    def __getitems__(self, items):
        if items[0] == list(order())[1][0]:
            time.sleep(100)
        return super().__getitems__(items)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_does_not_come_is_given_up_with_its_processes(workers):
    """Also one that the reading process itself waits for; the loader processes do not outlive it."""
    began = time.monotonic()
    found = batches(Hangs(), order(), workers, CPU, overdue=lambda: True)
    next(found)
    with pytest.raises(Stalled):
        next(found)
    assert time.monotonic() - began < 4
    for process in multiprocessing.active_children():
        process.join(1)
    assert multiprocessing.active_children() == []


def test_a_loader_process_that_was_killed_is_one_line_and_only_where_a_batch_is_waited_for():
    found = batches(Points(), order(), 1, CPU)
    next(found)
    for process in multiprocessing.active_children():
        process.kill()
    time.sleep(0.5)  # a step in the meantime, which torch's handler of SIGCHLD would end
    with pytest.raises(DataError, match=r"DataLoader worker .* too little memory for data.num_workers"):
        list(found)


def endless(taken):
    for i, _ in enumerate(batches(Points(), order(steps=10**6), 2, CPU)):
        taken.value = i


def test_loader_processes_of_a_killed_trainer_say_nothing(capfd):
    """Killed while one of them hands it a batch, four times, as most moments are."""
    for _ in range(4):
        taken = multiprocessing.Value("l", 0)
        trainer = multiprocessing.Process(target=endless, args=(taken,))
        trainer.start()
        while taken.value < 5:
            time.sleep(0.01)
        trainer.kill()
        trainer.join()
        time.sleep(0.2)
    assert capfd.readouterr().err == ""
