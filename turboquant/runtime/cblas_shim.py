"""Give the functions of a BLAS with 64-bit integers the plain names of CBLAS, for x86-64 (System V).

This module writes a tiny ELF shared object. Each of its functions has a plain name, widens its integer arguments to 64
bits, and jumps to the function of the other library. A product of one row goes to the function for vectors.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import tempfile

# Integer arguments on the stack, by their offset from rsp at entry. M, N and K are always in rcx, r8 and r9. Real
# alpha and beta are in xmm0 and xmm1; complex ones are pointers, which take a stack slot each.
_REAL = (16, 32, 48)  # return, A, lda, B, ldb, C, ldc
_COMPLEX = (24, 40, 64)  # return, alpha, A, lda, B, ldb, beta, C, ldc
FUNCTIONS = {"cblas_sgemm": _REAL, "cblas_dgemm": _REAL, "cblas_cgemm": _COMPLEX}
ONE_ROW = "cblas_sgemv"  # computes a product of one row, for which OpenBLAS's cblas_sgemm takes three times as long
TARGETS = (*FUNCTIONS, ONE_ROW)


def export(addresses: dict[str, int | None]) -> bool:
    """Make functions callable by plain name for libraries that are loaded from now on.

    addresses: of the functions with 64-bit integers, by the plain names, which are those of `TARGETS`.
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
    """Try small products, of one row and of two, so that a NumPy that was built differently gives no wrong numbers."""
    row_major, plain, transposed, one, zero = 101, 111, 112, ctypes.c_float(1), ctypes.c_float(0)
    library.cblas_sgemm.restype = None
    for rows, (order, ldb, b) in itertools.product(
        (1, 2), ((plain, 3, (1, 2, 3, 4, 5, 6)), (transposed, 2, (1, 4, 2, 5, 3, 6)))
    ):
        x, y, product = (ctypes.c_float * 4)(1, 2, 3, 4), (ctypes.c_float * 6)(*b), (ctypes.c_float * 6)()
        library.cblas_sgemm(row_major, plain, order, rows, 3, 2, one, x, 2, y, ldb, zero, product, 3)
        if list(product) != [9.0, 12.0, 15.0, 19.0, 26.0, 33.0][: 3 * rows] + [0.0] * (6 - 3 * rows):
            return False
    return True


def _shared_object() -> bytes:
    """Write an ELF64 x86-64 library (System V gABI, chapters 4 and 5) of `FUNCTIONS` and a slot for each of `TARGETS`.

    The first page holds headers, tables and code. The second is writable and holds the dynamic section and the slots.
    """
    page, headers, symbol_size, dynamic_size = 0x1000, 64 + 4 * 56, 24, 7 * 16
    names = [*FUNCTIONS, *(f"{name}_target" for name in TARGETS), "libturboquant-cblas.so"]
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    string_offset = {name: strings.index(b"\0" + name.encode() + b"\0") + 1 for name in names}
    count = 1 + len(FUNCTIONS) + len(TARGETS)
    # A hash table of one bucket is a chain of all symbols: number of buckets, length, first symbol, next ones.
    chain = struct.pack(f"<{3 + count}I", 1, count, 1, 0, *range(2, count), 0)
    chain += bytes(-len(chain) % 8)
    symbols_at = headers + len(chain)
    strings_at = symbols_at + symbol_size * count
    code_at, slots_at = strings_at + len(strings), page + dynamic_size

    code, functions, slots = b"", b"", b""
    slot_of = {name: slots_at + 8 * index for index, name in enumerate(TARGETS)}
    for name, stack in FUNCTIONS.items():
        stub = _widening(stack)
        if name == "cblas_sgemm":
            stub += _one_row(code_at + len(code) + len(stub), slot_of[ONE_ROW])
        stub += _jump(code_at + len(code) + len(stub), slot_of[name])
        functions += _symbol(string_offset[name], 0x12, code_at + len(code), len(stub))
        code += stub
    for name, slot in slot_of.items():
        slots += _symbol(string_offset[f"{name}_target"], 0x11, slot, 8)
    text = chain + bytes(symbol_size) + functions + slots + strings + code

    dynamic = {4: headers, 5: strings_at, 6: symbols_at, 10: len(strings), 11: symbol_size}
    dynamic |= {14: string_offset["libturboquant-cblas.so"], 0: 0}
    data = b"".join(struct.pack("<QQ", *entry) for entry in dynamic.items()) + bytes(8 * len(TARGETS))
    segments = _segment(1, 5, 0, headers + len(text), page) + _segment(1, 6, page, len(data), page)
    segments += _segment(2, 6, page, dynamic_size, 8) + _segment(0x6474E551, 6, 0, 0, 16)
    identity, shared, x86_64 = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9), 3, 62  # 64 bits, little-endian, System V
    header = identity + struct.pack("<HHIQQQIHHHHHH", shared, x86_64, 1, 0, 64, 0, 0, 64, 56, 4, 0, 0, 0)
    return (header + segments + text).ljust(page, b"\0") + data


def _widening(stack: tuple[int, ...]) -> bytes:
    """Write machine code that widens M, N, K and the leading dimensions to 64 bits.

    The caller leaves the upper halves of 32-bit arguments undefined. A called function may overwrite the stack slots of
    its arguments.
    """
    code = bytes.fromhex("4863c9 4d63c0 4d63c9")  # movsxd rcx, ecx; movsxd r8, r8d; movsxd r9, r9d
    for offset in stack:  # movsxd rax, dword [rsp + offset]; mov [rsp + offset], rax
        code += bytes.fromhex("48634424") + bytes([offset]) + bytes.fromhex("48894424") + bytes([offset])
    return code


def _one_row(address: int, slot: int) -> bytes:
    """Write machine code that turns cblas_sgemm's arguments into cblas_sgemv's and jumps there, if A is one row.

    A (1, K) times op(B) is op(B)' times a vector, for row-major A that is not transposed.
    """
    code = bytes.fromhex(
        "be df000000 29d6"  # mov esi, 223; sub esi, edx: CblasTrans for CblasNoTrans, and the other way round
        "83fa70"  # cmp edx, 112: is B transposed, (N, K)?
        "4c89c2 4c89c9"  # mov rdx, r8; mov rcx, r9: then it has N rows and K columns
        "7406"  # je over the next two
        "4c89ca 4c89c1"  # mov rdx, r9; mov rcx, r8: else K rows and N columns
        "4c8b442418 4c8b4c2420"  # mov r8, [rsp + 24]; mov r9, [rsp + 32]: B and its leading dimension
        "488b442428 4889442418"  # mov rax, [rsp + 40]; mov [rsp + 24], rax: C is the result; A, at 8, is the vector
        "48c744241001000000 48c744242001000000"  # mov qword [rsp + 16], 1; mov qword [rsp + 32], 1: both contiguous
    )
    checks = (
        bytes.fromhex("4883f901"),  # cmp rcx, 1: M
        bytes.fromhex("83ff65"),  # cmp edi, 101: row-major
        bytes.fromhex("83fe6f"),  # cmp esi, 111: A is not transposed
    )
    sizes = [len(check) + 2 for check in checks]  # each with its jump
    end = sum(sizes) + len(code) + 6
    head, position = b"", 0
    for check, size in zip(checks, sizes, strict=True):
        position += size
        head += check + b"\x75" + bytes([end - position])  # jne to what follows
    return head + code + _jump(address + len(head) + len(code), slot)


def _jump(address: int, slot: int) -> bytes:
    """Write machine code at ``address`` that jumps to the slot's function."""
    return b"\xff\x25" + struct.pack("<i", slot - (address + 6))  # jmp [rip + distance]


def _segment(kind: int, flags: int, offset: int, size: int, alignment: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, alignment)


def _symbol(name: int, info: int, address: int, size: int) -> bytes:
    defined = 1  # the file has no section table, so any number except that of "undefined" is right
    return struct.pack("<IBBHQQ", name, info, 0, defined, address, size)
