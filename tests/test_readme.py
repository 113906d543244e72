"""README's figures are those of the committed results, and its files exist."""

import re

from benchmarks import table


def test_the_table_is_what_the_results_say():
    assert table.README.read_text() == table.readme(), "run `python -m benchmarks.table`"


def test_every_linked_file_exists():
    text = table.README.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (table.README.parent / target).exists(), target


def test_every_path_that_contributing_names_exists():
    text = (table.README.parent / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"(?:^|[\s`(])((?:tests|kernels|benchmarks|docs|uvit_fast)/[\w/.]*)", text)
    assert len(paths) > 20
    for path in paths:
        assert (table.README.parent / path.rstrip(".")).exists(), path
