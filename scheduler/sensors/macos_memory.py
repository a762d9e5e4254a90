"""macOS memory limits: what Metal and the kernel let the GPU use; needs no root."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache

from core.units import MIB

_LIBRARY = "/usr/lib/libSystem.B.dylib"
_CORE_GRAPHICS = "/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics"
_METAL = "/System/Library/Frameworks/Metal.framework/Metal"
_OBJC = "/usr/lib/libobjc.A.dylib"
# The most memory that may be wired for the GPU, in MiB; 0 lets the system choose.
# Source: `sysctl iogpu.wired_limit_mb`, macOS 14 and later on Apple silicon.
_WIRED_LIMIT_KEY = b"iogpu.wired_limit_mb"
_MEMORY_KEY = b"hw.memsize"


class MacLimits:
    """The two limits of unified memory; a limit that cannot be read is None.

    The readers are arguments so that recorded answers of macOS can be replayed on any system.
    """

    def __init__(
        self,
        recommended_bytes: Callable[[], int] | None = None,
        wired_limit: Callable[[], bytes] | None = None,
    ) -> None:
        self._recommended_bytes = recommended_bytes or _metal_working_set_bytes
        self._wired_limit = wired_limit or (lambda: _sysctl(_WIRED_LIMIT_KEY))

    def gpu_bytes(self) -> int | None:
        """Return the user's wired limit, else what Metal recommends; None if unknown."""
        wired = self.wired_limit_bytes()
        if wired is not None:
            return wired
        try:
            found = self._recommended_bytes()
        except (OSError, AttributeError):
            return None
        return found if found > 0 else None

    def wired_limit_bytes(self) -> int | None:
        """Return the limit that the user set; None if the system chooses."""
        try:
            return parse_wired_limit(self._wired_limit())
        except (OSError, AttributeError, ValueError):
            return None


def mac_memory_bytes() -> int | None:
    """Return the RAM of a Mac; None if the system does not tell.

    From the kernel's own number: psutil 7.2 cannot read the structure of macOS 27.
    """
    try:
        value = _sysctl(_MEMORY_KEY)
    except (OSError, AttributeError):
        return None
    return int.from_bytes(value, "little") or None if len(value) == 8 else None


def parse_wired_limit(value: bytes) -> int | None:
    """Return the limit in bytes from a sysctl's answer, an integer of 4 or 8 bytes; None for 0.

    Raises ValueError for an invalid answer.
    """
    if len(value) not in (4, 8):
        raise ValueError(f"iogpu.wired_limit_mb has {len(value)} bytes")
    limit_mib = int.from_bytes(value, "little", signed=True)
    if limit_mib < 0:
        raise ValueError(f"iogpu.wired_limit_mb is {limit_mib}")
    return limit_mib * MIB or None


def _sysctl(key: bytes) -> bytes:
    """Return a sysctl's raw value.  Raises OSError if it does not exist."""
    buffer = ctypes.create_string_buffer(8)
    size = ctypes.c_size_t(8)
    library = ctypes.CDLL(_LIBRARY, use_errno=True)
    if library.sysctlbyname(key, buffer, ctypes.byref(size), None, ctypes.c_size_t(0)):
        raise OSError(ctypes.get_errno(), f"sysctl {key.decode()} failed")
    return buffer.raw[: size.value]


@cache
def _metal_working_set_bytes() -> int:
    """Return `recommendedMaxWorkingSetSize` of the first device; 0 without a device.

    Read once in a process: it opens the GPU.  Raises OSError, AttributeError.
    """
    return working_set_bytes(_CORE_GRAPHICS, _METAL, _OBJC)


def working_set_bytes(core_graphics: str, metal_library: str, objc_library: str) -> int:
    """Return what Metal recommends as the most memory of the GPU, in bytes; 0 without a device.

    A command-line tool has a default device only once CoreGraphics is loaded; the list of all
    devices does not depend on it.  Sources: Apple's documentation of MTLCreateSystemDefaultDevice,
    MTLCopyAllDevices, MTLDevice and NSArray, through the Objective-C runtime's C interface.
    Raises OSError, AttributeError.
    """
    # Metal answers without it as well, if only with its list of devices.
    with suppress(OSError):
        ctypes.CDLL(core_graphics)
    metal, objc = ctypes.CDLL(metal_library), ctypes.CDLL(objc_library)
    objc.sel_registerName.restype = ctypes.c_void_p
    objc.sel_registerName.argtypes = [ctypes.c_char_p]

    def send(
        receiver: int, selector: bytes, result: type[ctypes.c_void_p | ctypes.c_uint64]
    ) -> int:
        # Fixed arguments: on arm64 those of a variadic function are passed in another way.
        call = ctypes.CFUNCTYPE(result, ctypes.c_void_p, ctypes.c_void_p)(("objc_msgSend", objc))
        return int(call(receiver, objc.sel_registerName(selector)) or 0)

    metal.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
    device = metal.MTLCreateSystemDefaultDevice()
    if not device:
        metal.MTLCopyAllDevices.restype = ctypes.c_void_p
        devices = metal.MTLCopyAllDevices()
        device = send(devices, b"firstObject", ctypes.c_void_p) if devices else 0
    return send(device, b"recommendedMaxWorkingSetSize", ctypes.c_uint64) if device else 0
