#!/usr/bin/env python3
"""Keep one GPU architecture's code in a shared library: `te_one_arch.py libtransformer_engine.so 90`.

A fat binary in `.nv_fatbin` is a 16-byte header (magic, version, header size, u64 size of what follows) and entries of
header and payload, each for one architecture. The wanted entries move to the front, the header says their size, the
rest becomes zeros: addresses stay, and the file compresses to what is left (331 MB of TransformerEngine to 23 MB).
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

MAGIC = 0xBA55ED50


def section(data: bytearray, name: bytes) -> tuple[int, int]:
    """Offset and size of a section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_size, count, names_at = struct.unpack_from("<HHH", data, 58)
    entries = [struct.unpack_from("<IIQQQQ", data, table + i * entry_size) for i in range(count)]
    names = entries[names_at][4]
    for entry in entries:
        at = names + entry[0]
        if bytes(data[at : at + len(name) + 1]) == name + b"\0":
            return entry[4], entry[5]
    raise SystemExit(f"no section {name.decode()}: not a library with CUDA code?")


def keep(data: bytearray, arch: int) -> int:
    """Edit in place; returns the number of fat binaries."""
    at, size = section(data, b".nv_fatbin")
    end, found = at + size, 0
    while at < end:
        if struct.unpack_from("<I", data, at)[0] != MAGIC:
            at += 8  # alignment between fat binaries
            continue
        header, length = struct.unpack_from("<HQ", data, at + 6)
        entry, last, wanted = at + header, at + header + length, b""
        while entry < last:
            entry_header, payload = struct.unpack_from("<IQ", data, entry + 4)
            if struct.unpack_from("<I", data, entry + 28)[0] == arch:
                wanted += bytes(data[entry : entry + entry_header + payload])
            entry += entry_header + payload
        data[at + header : last] = wanted.ljust(length, b"\0")
        struct.pack_into("<Q", data, at + 8, len(wanted))
        at, found = last, found + 1
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    content = bytearray(path.read_bytes())
    print(f"{keep(content, int(sys.argv[2]))} fat binaries keep sm_{sys.argv[2]} alone")
    path.write_bytes(content)
