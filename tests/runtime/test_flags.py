"""A flag holds within its context, in its thread alone."""

import threading

import pytest

from uvit_fast.runtime.flags import Flag


def test_it_holds_until_the_outermost_context_ends_even_by_an_error():
    flag = Flag("flag")
    with pytest.raises(ZeroDivisionError), flag():
        with flag():
            assert flag
        assert flag
        raise ZeroDivisionError
    assert not flag


def test_another_thread_has_its_own():
    flag, seen = Flag("flag"), []
    with flag():
        thread = threading.Thread(target=lambda: seen.append(bool(flag)))
        thread.start()
        thread.join()
    assert seen == [False]
