"""Reading what `torch.save` wrote, without PyTorch and without running what a file says.

Such a file is a zip of a pickle and of raw tensors. The pickle may name what rebuilds dense
tensors, and nothing else.
"""

import collections
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fkv.errors import UserError

_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "BoolStorage": np.bool_,
}


def _tensor(storage, offset, size, stride, *_):
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    outside = 0 not in size and last >= len(storage)
    if outside or min((offset, *size, *stride)) < 0 or math.prod(size) > len(storage):
        raise ValueError("a tensor lies outside of its storage")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, name: str):
        super().__init__(archive.open(name))
        self._archive, self._root = archive, name.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _DTYPES:
            return name
        raise ValueError(f"it names {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise ValueError(f"it has a {kind!r}, which is no tensor")
        dtype = np.dtype(_DTYPES[dtype])
        with self._archive.open(f"{self._root}data/{key}") as file:
            return np.frombuffer(file.read(), dtype, count)


def read(path: Path) -> Any:
    """Containers, numbers, text and NumPy arrays of a file; raises `UserError` for all others."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it holds no data.pkl")
            orders = [name for name in names if name.split("/")[-1] == "byteorder"]
            if any(archive.read(name) != b"little" for name in orders):
                raise ValueError("its bytes are big-endian")
            return _Reader(archive, pickles[0]).load()
    except Exception as error:  # a damaged pickle may raise anything
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: not a file that torch.save wrote ({said})") from error
