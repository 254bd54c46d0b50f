"""Tables of a results file while they are written: rows appended together, texts as codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from pipelines.results_layout import FLAG_BITS, Column

CHUNK_BYTES = 16 * 1024  # small enough to rewrite at each flush, large enough to read back fast
NAME_BYTES = 192


class Rows:
    """Rows of one table, gathered in memory and appended together."""

    def __init__(self, group: Any, columns: Mapping[str, Column]) -> None:
        self._columns = columns
        self._pending: dict[str, list[Any]] = {name: [] for name in columns}
        self._datasets = {}
        for name, column in columns.items():
            row_bytes = np.dtype(column.dtype).itemsize * int(np.prod(column.shape, dtype=int))
            dataset = group.create_dataset(
                name,
                shape=(0, *column.shape),
                maxshape=(None, *column.shape),
                chunks=(max(64, CHUNK_BYTES // row_bytes), *column.shape),
                dtype=column.dtype,
            )
            if column.units:
                dataset.attrs["units"] = column.units
            if column.names:
                dataset.attrs["codes_of"] = f"/entry/names/{column.names}"
            self._datasets[name] = dataset
        self.count = 0  # rows appended and pending together

    def datasets(self) -> list[Any]:
        """Return the HDF5 datasets behind it."""
        return list(self._datasets.values())

    def add(self, **values: Any) -> None:
        """Take a row, a value a column; it is in the file after the next `write`."""
        for name, pending in self._pending.items():
            pending.append(values[name])
        self.count += 1

    def write(self) -> None:
        """Append what is pending and flush it."""
        pending = next(iter(self._pending.values()))
        if not pending:
            return
        start = self.count - len(pending)
        for name, column in self._columns.items():
            rows = np.asarray(self._pending[name], dtype=column.dtype).reshape(-1, *column.shape)
            dataset = self._datasets[name]
            dataset.resize(self.count, axis=0)
            dataset[start:] = rows
            dataset.flush()
        for values in self._pending.values():
            values.clear()


class Names:
    """The texts behind the codes of a column."""

    def __init__(self, group: Any, name: str) -> None:
        self._dataset = group.create_dataset(
            name, shape=(0,), maxshape=(None,), chunks=(64,), dtype=h5py.string_dtype("utf-8", NAME_BYTES)
        )
        self._codes: dict[str, int] = {}
        self._written = 0

    def datasets(self) -> list[Any]:
        """Return the HDF5 dataset behind it."""
        return [self._dataset]

    def code(self, text: str) -> int:
        """Return the code of a text, a new one where it was not seen before."""
        return self._codes.setdefault(text, len(self._codes))

    def bits(self, texts: tuple[str, ...]) -> int:
        """Return one bit a text; the last bit stands for all texts beyond the first 63."""
        value = 0
        for text in texts:
            if text in self._codes or len(self._codes) < FLAG_BITS - 1:
                value |= 1 << self.code(text)
            else:
                value |= 1 << self._codes.setdefault("other", FLAG_BITS - 1)
        return value

    def write(self) -> None:
        """Append the texts that are new and flush them."""
        if len(self._codes) == self._written:
            return
        new = [text.encode()[:NAME_BYTES] for text in list(self._codes)[self._written :]]
        self._dataset.resize(len(self._codes), axis=0)
        self._dataset[self._written :] = np.array(new, dtype=self._dataset.dtype)
        self._dataset.flush()
        self._written = len(self._codes)
