"""Is there a GPU that can be used? Asked of the driver itself, before any CUDA library is loaded.

Some TensorRT runtimes crash where there is no driver, so nothing of theirs is touched until `probe`
has found a device.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

_NAME_BYTES = 256
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...


@dataclass(frozen=True)
class Cuda:
    """What the driver says of the first device.

    Attributes
    ----------
    problem : str
        Why there is no device to use, "" when there is one.
    driver : (int, int)
        Newest CUDA version that the driver serves.
    device : str
        Its name.
    capability : (int, int)
        Its compute capability.
    """

    problem: str = ""
    driver: tuple[int, int] = (0, 0)
    device: str = ""
    capability: tuple[int, int] = (0, 0)

    def lacks(self, needed: tuple[int, int]) -> str:
        """Return why a library made for a CUDA version cannot run here, "" when it can."""
        if self.problem or self.driver >= needed:
            return self.problem
        return (
            f"the driver of {self.device} serves CUDA {self.driver[0]}.{self.driver[1]}, but"
            f" {needed[0]}.{needed[1]} is needed: update the driver"
        )


def probe() -> Cuda:
    """Ask the driver. Costs a few milliseconds without one, tenths of a second with one."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return Cuda(f"no NVIDIA driver ({library} is not there)")
    version, count, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0)
    if status:
        return Cuda(f"the NVIDIA driver does not start (cuInit: error {status}; nvidia-smi may say why)")
    driver.cuDriverGetVersion(ctypes.byref(version))
    served = (version.value // 1000, version.value % 1000 // 10)
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return Cuda("the NVIDIA driver knows no device", served)
    status = driver.cuDeviceGet(ctypes.byref(device), 0)
    if status:
        return Cuda(f"the first NVIDIA device cannot be opened (cuDeviceGet: error {status})", served)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Cuda("", served, name.value.decode(errors="replace"), (capability[0], capability[1]))
