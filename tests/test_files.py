"""What has its name is whole."""

from pathlib import Path

import pytest

from uvit_fast.files import write_whole


@pytest.mark.parametrize("folder", [False, True])
def test_a_write_that_fails_leaves_what_was_there(folder, tmp_path):
    path = tmp_path / "new" / "out.npz"

    def write(temporary: Path) -> None:
        assert temporary.suffix == path.suffix  # some writers add one that is missing
        if folder:
            temporary.mkdir()
        (temporary / "part" if folder else temporary).write_text("half")
        raise OSError("disk full")

    write_whole(path, lambda temporary: temporary.write_text("whole"))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, write)
    assert [each.read_text() for each in path.parent.iterdir()] == ["whole"]
