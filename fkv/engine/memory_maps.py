"""Compiled programs are dropped before Linux refuses to map more memory for them.

Each program that XLA compiles for a CPU takes tens of mappings, and a process may have 65,530
(`vm.max_map_count`). At the limit LLVM reports "Cannot allocate memory", and the process crashes.
"""

from pathlib import Path

import jax

_MAPS, _MOST = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_SHARE = 0.6  # the rest is for what one policy at one budget compiles, and for other libraries


def make_room() -> None:
    """Drops all compiled programs if this process is near the limit; they are compiled again.

    Call it where few of them are needed again. Elsewhere than on Linux it does nothing.
    """
    try:
        most, held = int(_MOST.read_text()), _MAPS.read_bytes().count(b"\n")
    except OSError:
        return
    if held > _SHARE * most:
        jax.clear_caches()
