"""Give the functions of a BLAS with 64-bit integers the plain names of CBLAS, for x86-64 (System V).

This module writes a tiny ELF shared object. Each of its functions has a plain name, widens its integer arguments to 64
bits, and jumps to the function of the other library.
"""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile

# Integer arguments on the stack, by their offset from rsp at entry. M, N and K are always in rcx, r8 and r9. Real
# alpha and beta are in xmm0 and xmm1; complex ones are pointers, which take a stack slot each.
_REAL = (16, 32, 48)  # return, A, lda, B, ldb, C, ldc
_COMPLEX = (24, 40, 64)  # return, alpha, A, lda, B, ldb, beta, C, ldc
FUNCTIONS = {"cblas_sgemm": _REAL, "cblas_dgemm": _REAL, "cblas_cgemm": _COMPLEX}


def export(addresses: dict[str, int | None]) -> bool:
    """Make functions callable by plain name for libraries that are loaded from now on.

    addresses: of the functions with 64-bit integers, by the plain names, which are those of `FUNCTIONS`.
    Returns False where this machine cannot load the shared object, or a product comes out wrong.
    """
    for write in (_memory_file, _temporary_file):
        try:
            descriptor, path = write(_shared_object())
        except OSError:
            continue
        try:
            library = ctypes.CDLL(path)
            for name, address in addresses.items():
                ctypes.c_void_p.in_dll(library, f"{name}_target").value = address
            if not _multiplies(library):
                return False
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # the same file again, now visible to other libraries
            return True
        except OSError:  # memory files, or files in the temporary folder, may not be executed here
            continue
        finally:
            os.close(descriptor)
            if not path.startswith("/proc/"):
                os.unlink(path)
    return False


def _memory_file(content: bytes) -> tuple[int, str]:
    descriptor = os.memfd_create("turboquant-cblas")
    os.write(descriptor, content)
    return descriptor, f"/proc/self/fd/{descriptor}"


def _temporary_file(content: bytes) -> tuple[int, str]:
    descriptor, path = tempfile.mkstemp(suffix=".so")
    os.write(descriptor, content)
    return descriptor, path


def _multiplies(library: ctypes.CDLL) -> bool:
    """Try one small product, (1, 2) x (2, 3), so that a NumPy that was built differently gives MLX no wrong numbers."""
    row_major, plain, one, zero = 101, 111, ctypes.c_float(1), ctypes.c_float(0)
    a, b, c = (ctypes.c_float * 2)(1, 2), (ctypes.c_float * 6)(1, 2, 3, 4, 5, 6), (ctypes.c_float * 3)()
    library.cblas_sgemm.restype = None
    library.cblas_sgemm(row_major, plain, plain, 1, 3, 2, one, a, 2, b, 3, zero, c, 3)
    return list(c) == [9.0, 12.0, 15.0]


def _shared_object() -> bytes:
    """Write an ELF64 x86-64 library (System V gABI, chapters 4 and 5) of `FUNCTIONS` and their `_target` slots.

    The first page holds headers, tables and code. The second is writable and holds the dynamic section and the slots.
    """
    page, headers, symbol_size, dynamic_size = 0x1000, 64 + 4 * 56, 24, 7 * 16
    names = [*FUNCTIONS, *(f"{name}_target" for name in FUNCTIONS), "libturboquant-cblas.so"]
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    string_offset = {name: strings.index(b"\0" + name.encode() + b"\0") + 1 for name in names}
    count = 1 + 2 * len(FUNCTIONS)
    # A hash table of one bucket is a chain of all symbols: number of buckets, length, first symbol, next ones.
    chain = struct.pack(f"<{3 + count}I", 1, count, 1, 0, *range(2, count), 0)
    chain += bytes(-len(chain) % 8)
    symbols_at = headers + len(chain)
    strings_at = symbols_at + symbol_size * count
    code_at, slots_at = strings_at + len(strings), page + dynamic_size

    code, functions, slots = b"", b"", b""
    for index, (name, stack) in enumerate(FUNCTIONS.items()):
        slot = slots_at + 8 * index
        stub = _stub(stack, code_at + len(code), slot)
        functions += _symbol(string_offset[name], 0x12, code_at + len(code), len(stub))
        slots += _symbol(string_offset[f"{name}_target"], 0x11, slot, 8)
        code += stub
    text = chain + bytes(symbol_size) + functions + slots + strings + code

    dynamic = {4: headers, 5: strings_at, 6: symbols_at, 10: len(strings), 11: symbol_size}
    dynamic |= {14: string_offset["libturboquant-cblas.so"], 0: 0}
    data = b"".join(struct.pack("<QQ", *entry) for entry in dynamic.items()) + bytes(8 * len(FUNCTIONS))
    segments = _segment(1, 5, 0, headers + len(text), page) + _segment(1, 6, page, len(data), page)
    segments += _segment(2, 6, page, dynamic_size, 8) + _segment(0x6474E551, 6, 0, 0, 16)
    identity, shared, x86_64 = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9), 3, 62  # 64 bits, little-endian, System V
    header = identity + struct.pack("<HHIQQQIHHHHHH", shared, x86_64, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0)
    return (header + segments + text).ljust(page, b"\0") + data


def _stub(stack: tuple[int, ...], address: int, slot: int) -> bytes:
    """Write machine code that widens M, N, K and the leading dimensions to 64 bits and jumps to the slot's function.

    The caller leaves the upper halves of 32-bit arguments undefined. A called function may overwrite the stack slots of
    its arguments.
    """
    code = bytes.fromhex("4863c9 4d63c0 4d63c9")  # movsxd rcx, ecx; movsxd r8, r8d; movsxd r9, r9d
    for offset in stack:  # movsxd rax, dword [rsp + offset]; mov [rsp + offset], rax
        code += bytes.fromhex("48634424") + bytes([offset]) + bytes.fromhex("48894424") + bytes([offset])
    return code + b"\xff\x25" + struct.pack("<i", slot - (address + len(code) + 6))  # jmp [rip + distance]


def _segment(kind: int, flags: int, offset: int, size: int, alignment: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, alignment)


def _symbol(name: int, info: int, address: int, size: int) -> bytes:
    defined = 1  # the file has no section table, so any number except that of "undefined" is right
    return struct.pack("<IBBHQQ", name, info, 0, defined, address, size)
