"""macOS memory limits: what Metal and the kernel let the GPU use; needs no root."""

import ctypes
from collections.abc import Callable

from core.units import MIB

_LIBRARY = "/usr/lib/libSystem.B.dylib"
_METAL = "/System/Library/Frameworks/Metal.framework/Metal"
_OBJC = "/usr/lib/libobjc.A.dylib"
# The most memory that may be wired for the GPU, in MiB; 0 lets the system choose.
# Source: `sysctl iogpu.wired_limit_mb`, macOS 14 and later on Apple silicon.
_WIRED_LIMIT_KEY = b"iogpu.wired_limit_mb"


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


def _metal_working_set_bytes() -> int:
    """Return `recommendedMaxWorkingSetSize` of the default device; 0 without a device.

    Source: Metal's MTLDevice, through the Objective-C runtime's C interface.
    """
    metal, objc = ctypes.CDLL(_METAL), ctypes.CDLL(_OBJC)
    metal.MTLCreateSystemDefaultDevice.restype = ctypes.c_void_p
    device = metal.MTLCreateSystemDefaultDevice()
    if not device:
        return 0
    objc.sel_registerName.restype = ctypes.c_void_p
    objc.sel_registerName.argtypes = [ctypes.c_char_p]
    send = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)(
        ("objc_msgSend", objc)
    )
    return int(send(device, objc.sel_registerName(b"recommendedMaxWorkingSetSize")))
