"""Zero the device code in a .so that an sm_90 GPU does not load: slim.py IN OUT.

What other GPUs would load becomes zeros, which compress to nothing; names and sizes stay.
"""

import struct
import sys
from pathlib import Path

MAGIC, PTX, CUBIN, WANTED = 0xBA55ED50, 1, 2, 90


def fatbin_section(data: bytearray) -> tuple[int, int]:
    table = struct.unpack_from("<Q", data, 0x28)[0]
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    for s in sections:
        at = sections[names][4] + s[0]
        if data[at : data.index(0, at)] == b".nv_fatbin":
            return s[4], s[4] + s[5]
    raise SystemExit("no .nv_fatbin section")


def main(source: str, target: str) -> None:
    data = bytearray(Path(source).read_bytes())
    at, end = fatbin_section(data)
    while at < end - 16:
        magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
        if magic != MAGIC:
            at += 8
            continue
        entries, entry, at = [], at + header, at + header + size
        while entry < at:
            kind, _, header, length = struct.unpack_from("<HHIQ", data, entry)
            arch = struct.unpack_from("<I", data, entry + 28)[0]
            entries.append((kind, arch, entry + header, length))
            entry += header + length
        if (CUBIN, WANTED) in [e[:2] for e in entries]:
            for kind, arch, start, length in entries:
                if (kind, arch) != (CUBIN, WANTED):
                    data[start : start + length] = bytes(length)
        else:  # the driver compiles PTX
            for kind, _, start, length in entries:
                if kind != PTX:
                    data[start : start + length] = bytes(length)
    Path(target).write_bytes(data)


main(*sys.argv[1:])
