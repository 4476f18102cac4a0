"""How a command starts: TensorFlow without what it does not need, and nothing left behind for the program around."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from conftest import Finished

from tapedist import process, runtime_flags

_COMMAND = """
import sys
from tapedist.cli import main
code = main(["train", "--noplots", "--n_samples=100", "--num_epochs=2"])
assert code == 0 and "tensorflow" in sys.modules
print({"keras.src", "matplotlib", "pandas", "sklearn", "pyarrow"} & set(sys.modules))
import tensorflow as tf
print(tf.keras.layers.Dense.__name__, "keras.src" in sys.modules)
"""


def test_a_command_imports_no_keras_and_leaves_it_to_be_had(run_python: Callable[..., Finished]) -> None:
    done = run_python("-c", _COMMAND)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-2:] == ["set()", "Dense True"]


def test_a_program_that_imports_tapedist_finds_tensorflow_as_it_is(run_python: Callable[..., Finished]) -> None:
    assert run_python("-c", "import sys, tapedist.run.train; print('keras.src' in sys.modules)").out == "True\n"


def test_keras_is_refused_to_tensorflow_alone() -> None:
    with runtime_flags.keras_left_out():
        import tensorflow as tf  # Imported long ago, so that whoever asks for Keras now is another.

        assert tf.keras.__name__


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_afterwards_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with process.importing():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(ImportError), process.importing():
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()
