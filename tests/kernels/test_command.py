"""`make test-kernel` knows the tests of every op, and says which ops there are."""

import pytest

from tests.kernels.__main__ import OPS, ROOT, main, selected


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_tested_by_files_that_exist_in_the_interpreter_and_on_a_gpu(op):
    files = [argument for argument in selected(op) if argument.endswith(".py")]
    assert all((ROOT / file).exists() for file in files)
    assert {file.split("/")[1] for file in files} == {"kernels", "gpu"}
    assert any("pytest.mark.interpreter" in (ROOT / file).read_text() for file in files)


@pytest.mark.parametrize("given, words", [([], "got none"), (["ln_mpl"], "got 'ln_mpl'")])
def test_without_an_op_it_names_them(given, words, capsys):
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and "ln_mlp, proj_ln_mlp" in said
