"""The CUDA driver through its C interface: which GPU is here, its memory, one stream. Needs no package."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepack.errors import DeviceError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NO_DEVICE = 100
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
NON_BLOCKING = 1
SIGNATURES: dict[str, Sequence[Any]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuMemAlloc_v2": (c_void_p, c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuGetErrorString": (c_int, c_void_p),
}


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for.

    Attributes:
        name: as the driver calls it, such as ``NVIDIA H200``.
        compute_capability: such as ``9.0``.
    """

    name: str
    compute_capability: str


class Driver:
    """The CUDA driver of this machine."""

    def __init__(self) -> None:
        """Load and start the driver. Raises DeviceError: there is no driver, or no GPU."""
        self._library = _open()
        status = self._library.cuInit(0)
        if status == NO_DEVICE:
            raise DeviceError("there is no NVIDIA GPU here", "use a machine with one")
        self._accept(status, "start")
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        self.count = count.value
        if not self.count:
            raise DeviceError("there is no NVIDIA GPU here", "use a machine with one")

    def call(self, name: str, *arguments: Any) -> None:
        """One function of the driver. Raises DeviceError with the driver's own words."""
        self._accept(getattr(self._library, name)(*arguments), name)

    def gpu(self, index: int) -> Gpu:
        """Raises DeviceError: there is no GPU of this number."""
        device = self.device(index)
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, 256, device)
        numbers = [c_int(), c_int()]
        for number, attribute in zip(numbers, (MAJOR, MINOR), strict=True):
            self.call("cuDeviceGetAttribute", byref(number), attribute, device)
        return Gpu(name.value.decode("utf-8", "replace"), ".".join(str(number.value) for number in numbers))

    def device(self, index: int) -> int:
        if index >= self.count:
            raise DeviceError(f"there is no GPU {index}; this machine has {self.count}", "device = 0 is the first")
        device = c_int()
        self.call("cuDeviceGet", byref(device), index)
        return device.value

    def _accept(self, status: int, what: str) -> None:
        if status == 0:
            return
        words = c_char_p()
        self._library.cuGetErrorString(status, byref(words))
        raise DeviceError(f"the CUDA driver failed in {what}: {(words.value or b'unknown').decode()} ({status})")


class Place:
    """A GPU in use: its context, one stream, and buffers by name that grow as needed."""

    def __init__(self, driver: Driver, index: int) -> None:
        self._driver = driver
        self._device = driver.device(index)
        self._context, self._stream = c_void_p(), c_void_p()
        self._buffers: dict[str, tuple[int, int]] = {}
        driver.call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self.enter()
        driver.call("cuStreamCreate", byref(self._stream), NON_BLOCKING)

    @property
    def stream(self) -> int:
        return self._stream.value or 0

    def enter(self) -> None:
        """Make the GPU this thread's."""
        self._driver.call("cuCtxSetCurrent", self._context)

    def buffer(self, name: str, size_bytes: int) -> int:
        """Address of at least this much memory, the same for the same name until it must grow."""
        address, capacity = self._buffers.get(name, (0, 0))
        if capacity < size_bytes:
            if address:
                del self._buffers[name]
                self._driver.call("cuMemFree_v2", address)
            pointer = c_uint64()
            self._driver.call("cuMemAlloc_v2", byref(pointer), size_bytes)
            address = pointer.value
            self._buffers[name] = (address, size_bytes)
        return address

    def upload(self, array: np.ndarray[Any, Any], address: int) -> None:
        """Start copying a contiguous array to the GPU; it must live until ``wait``."""
        self._driver.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Start copying into a contiguous array; it is complete after ``wait``."""
        self._driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self._stream)

    def wait(self) -> None:
        self._driver.call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        self.enter()
        for address, _ in self._buffers.values():
            self._driver.call("cuMemFree_v2", address)
        self._buffers.clear()
        self._driver.call("cuStreamDestroy_v2", self._stream)
        self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device)


def _open() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DeviceError(
            f"the NVIDIA driver is not installed ({LIBRARY} was not found)", "install the driver of your GPU"
        ) from error
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library
