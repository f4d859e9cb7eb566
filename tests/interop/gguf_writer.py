"""Writes GGUF files from NumPy arrays, for tests: independent of the reader, by the format's description."""

import struct

import numpy as np

_KINDS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
FLOAT32, Q4_0, Q4_1, Q8_0 = 0, 2, 3, 8


def _string(text):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value):
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    kind, code = _KINDS[type(value)]
    return struct.pack("<I", kind) + struct.pack(code, value)


def _pack(array, kind):
    if kind == FLOAT32:
        return array.astype("<f4").tobytes()
    data = b""
    for block in array.reshape(-1, 32).astype(np.float64):
        if kind == Q8_0:
            scale = np.float16(abs(block).max() / 127)
            data += scale.tobytes() + np.rint(block / scale).astype(np.int8).tobytes()
            continue
        if kind == Q4_0:
            scale = np.float16(abs(block).max() / 7)
            head, codes = scale.tobytes(), np.rint(block / scale).astype(int) + 8
        else:
            scale, low = np.float16(np.ptp(block) / 15), np.float16(block.min())
            head, codes = scale.tobytes() + low.tobytes(), np.rint((block - float(low)) / scale).clip(0, 15).astype(int)
        data += head + bytes(int(codes[i]) | int(codes[i + 16]) << 4 for i in range(16))
    return data


def write(path, metadata, tensors):
    """Writes `tensors`, {name: (array, type)}, and `metadata`, {key: value}."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        header += _string(key) + _value(value)
    blobs, offset = [], 0
    for name, (array, kind) in tensors.items():
        header += _string(name) + struct.pack("<I", array.ndim)
        header += struct.pack(f"<{array.ndim}Q", *reversed(array.shape)) + struct.pack("<IQ", kind, offset)
        blob = _pack(array, kind)
        blobs.append(blob + b"\0" * (-len(blob) % 32))
        offset += len(blobs[-1])
    path.write_bytes(header + b"\0" * (-len(header) % 32) + b"".join(blobs))
