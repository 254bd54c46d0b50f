"""What every bundle needs: networks as ONNX, self-tests, and the revision of the code that made them."""

from __future__ import annotations

import io
import logging
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

_OPSET = 20


def onnx_of(network: nn.Module, examples: Mapping[str, torch.Tensor], outputs: tuple[str, ...]) -> bytes:
    """Return a network as ONNX, the number of rows being free.

    Parameters
    ----------
    network : torch.nn.Module
        In evaluation mode.
    examples : dict of str to tensor
        Two rows of each input, by name, in the order that the network takes them.
    outputs : tuple of str
        Names, in the order that the network gives them.
    """
    batch = torch.export.Dim("batch", min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # The exporter warns of its own internals.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            tuple(examples.values()),
            dynamo=True,
            opset_version=_OPSET,
            input_names=list(examples),
            output_names=list(outputs),
            # By place: a network may call its inputs something else.
            dynamic_shapes=tuple({0: batch} for _ in examples),
            verbose=False,
        )
    assert program is not None
    return bytes(_bare(program.model_proto).SerializeToString(deterministic=True))


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take out what the exporter notes of where the code lies and who called what.

    The same weights are the same bytes wherever they were exported, and a bundle tells nobody's paths.
    """
    graph = model.graph
    for noted in (
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
        *model.functions,
        *(node for function in model.functions for node in function.node),
    ):
        del noted.metadata_props[:]
        noted.doc_string = ""
    return model


def archive(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return arrays as the contents of an .npz file, compressed."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def git_revision() -> str:
    """Return the revision of the code this file belongs to, "-dirty" when code was changed since."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False
        )

    try:
        revision = git("describe", "--always", "--exclude=*").stdout.strip()
        # Code alone: training writes bundles, which may lie in the same checkout.
        changed = git("status", "--porcelain", "--", ":/*.py").stdout.strip()
    except OSError:
        return "unknown (no git)"
    if not revision:
        return "unknown (not a git checkout)"
    return f"{revision}-dirty" if changed else revision
