"""Run the network of a bundle with ONNX Runtime on one core."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from pipelines.engines.bundle import Bundle, BundleError

Array = npt.NDArray[np.float32]

MODEL = "model.onnx"
SELF_TEST = "selftest.npz"


class OnnxEngine:
    """One network, ready: loaded, tested with the batch of its bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """Load the network and run its self-test.

        Raises
        ------
        BundleError
            If ONNX Runtime is not installed, refuses the file, or the answers are not those that
            the bundle was made with.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise BundleError(
                f"{bundle.folder}: a bundle needs ONNX Runtime: pip install 'grainwatch[daemon]'"
            ) from error
        options = onnxruntime.SessionOptions()
        # Workers share the cores: a thread that spins while it waits takes a neighbour's.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                bundle.file(MODEL), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime has no common base of its errors
            raise BundleError(f"{bundle.folder / MODEL}: ONNX Runtime refuses it: {error}") from error
        self._input = self._session.get_inputs()[0].name
        self._width = self._session.get_inputs()[0].shape[-1]
        self._test(bundle)

    def run(self, x: Array) -> Array:
        """Return the output (n, m) for inputs (n, width)."""
        (out,) = self._session.run(None, {self._input: x})
        return np.asarray(out, dtype=np.float32)

    def _test(self, bundle: Bundle) -> None:
        with np.load(io.BytesIO(bundle.file(SELF_TEST)), allow_pickle=False) as stored:
            x, expected = stored["input"].astype(np.float32), stored["output"]
        where = bundle.folder / SELF_TEST
        if x.ndim != 2 or x.shape[1] != self._width:
            raise BundleError(f"{where}: inputs of shape {x.shape}, the network takes {self._width} numbers")
        got = self.run(x)
        tolerance = bundle.description.tolerances["self_test"]
        worst = float(np.abs(got - expected).max()) if got.shape == expected.shape else float("inf")
        if not worst <= tolerance:
            raise BundleError(
                f"{where}: the network's answers are off by {worst:.2g}, allowed {tolerance:.2g}:"
                " the bundle, or ONNX Runtime on this machine, is not what it was made with"
            )
