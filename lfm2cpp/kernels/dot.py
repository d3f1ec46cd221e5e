"""Sums of short products into each 4-byte lane: the words that every instruction set spells differently.

    dot_u7(acc, u, a)         acc + sum of 4 u * a                             u in 0..127, a int8
    dot2_u6(acc, u, a, v, b)  acc + sum of 4 u * a + sum of 4 v * b            u, v in 0..63, a, b int8
    dot_i8(acc, w, a)         acc + sum of 4 w * a + I8_BIAS * sum of 4 a      w, a int8
    dot_bf16(w, a, acc)       acc + sum of 2 w * a                             w, a bfloat16, acc float32

AVX-512 VNNI and AVX-VNNI multiply unsigned by signed bytes, so a signed weight goes in with its top bit flipped and
the caller takes I8_BIAS times the activations' sum off again; elsewhere I8_BIAS is 0. Every product is exact.
"""

from __future__ import annotations

from llvmlite import ir

from .portable import multiply_add
from .scalar import I16
from .simd.registers import F32_VECTOR, I8_VECTOR, I32_VECTOR, LEVEL, W, bytes_, f32, i32
from .vector import call_llvm, constant, shuffle, vector_op
from .widths import BF16_PAIRS, PAIR_SUMS

_VNNI = not {"avx512vnni", "avxvnni"}.isdisjoint(LEVEL.features)
NEON = LEVEL.name.startswith("neon")
I8_BIAS = 128 if _VNNI else 0


def _vpdpbusd(builder, acc, u, a):
    # Operands as i32 lanes: old LLVMs take this form natively, newer ones upgrade it.
    name = f"llvm.x86.avx512.vpdpbusd.{LEVEL.bits}"
    return call_llvm(builder, name, I32_VECTOR, acc, builder.bitcast(u, I32_VECTOR), builder.bitcast(a, I32_VECTOR))


def pair_products(builder, u, a):
    """AVX2: u[2 i] * a[2 i] + u[2 i + 1] * a[2 i + 1] as int16, which must hold it; u unsigned, a int8"""
    return call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 2 * W), u, a)


def pairs_that_fit(largest):
    """How many results of pair_products add up in 16 bits, for weights 0..largest"""
    return 32767 // (2 * 127 * largest)


def add_pairs(builder, acc, pairs):
    """AVX2: acc + the sum of 2 int16 within each lane"""
    ones = constant(ir.VectorType(I16, 2 * W), 1)
    return builder.add(acc, call_llvm(builder, "llvm.x86.avx2.pmadd.wd", I32_VECTOR, pairs, ones))


def _maddubs(builder, acc, u, a):
    return add_pairs(builder, acc, pair_products(builder, u, a))


def _sdot(builder, acc, w, a):
    return call_llvm(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", I32_VECTOR, acc, w, a)


def dot_pairs_value(builder, acc, w, a):
    """NEON i8mm: 2 rows by 2 tokens, 8 columns of each: acc[r][t] + sum of w[r] * a[t]"""
    return call_llvm(builder, "llvm.aarch64.neon.smmla.v4i32.v16i8", I32_VECTOR, acc, w, a)


def _widened(builder, acc, w, a):
    wide = ir.VectorType(I16, 4 * W)
    products = builder.mul(builder.sext(w, wide), builder.sext(a, wide))
    products = builder.sext(products, ir.VectorType(ir.IntType(32), 4 * W))
    for i in range(4):
        acc = builder.add(acc, shuffle(builder, products, products, list(range(i, 4 * W, 4))))
    return acc


def dot_u7_value(builder, acc, u, a):
    if _VNNI:
        return _vpdpbusd(builder, acc, u, a)
    if PAIR_SUMS:
        return _maddubs(builder, acc, u, a)
    return (_sdot if NEON else _widened)(builder, acc, u, a)


def dot_i8_value(builder, acc, w, a):
    if _VNNI:
        return _vpdpbusd(builder, acc, builder.xor(w, constant(I8_VECTOR, 128)), a)
    if PAIR_SUMS:
        # |w| * (a with w's sign): products stay in a signed 16-bit pair sum as long as |a| <= 127.
        size = call_llvm(builder, f"llvm.abs.v{4 * W}i8", I8_VECTOR, w, ir.Constant(ir.IntType(1), 0))
        return _maddubs(builder, acc, size, call_llvm(builder, "llvm.x86.avx2.psign.b", I8_VECTOR, a, w))
    return (_sdot if NEON else _widened)(builder, acc, w, a)


def dot_panel_i8_value(builder, acc, w, a):
    """dot_i8_value for weights that went through panel_i8."""
    return _vpdpbusd(builder, acc, w, a) if _VNNI else dot_i8_value(builder, acc, w, a)


def dot_bf16_value(builder, w, a, acc):
    """w, a: float32 lanes that hold two bfloat16 each."""
    w, a = builder.bitcast(w, I32_VECTOR), builder.bitcast(a, I32_VECTOR)
    if BF16_PAIRS:
        return call_llvm(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32_VECTOR, acc, w, a)
    high, sixteen = constant(I32_VECTOR, 0xFFFF0000), constant(I32_VECTOR, 16)
    odd = [builder.bitcast(builder.and_(pair, high), F32_VECTOR) for pair in (w, a)]
    even = [builder.bitcast(builder.shl(pair, sixteen), F32_VECTOR) for pair in (w, a)]
    return multiply_add(builder, *even, multiply_add(builder, *odd, acc))


@vector_op(f32, f32, f32, f32)
def dot_bf16(builder, w, a, acc):
    """acc + sum of 2 w * a within each lane, which holds two bfloat16 of w and of a"""
    return dot_bf16_value(builder, w, a, acc)


@vector_op(bytes_, bytes_)
def panel_i8(builder, w):
    """Signed weights as a panel holds them, used many times over: plus I8_BIAS where the product wants them unsigned"""
    return builder.xor(w, constant(I8_VECTOR, 128)) if _VNNI else w


@vector_op(i32, i32, bytes_, bytes_)
def dot_panel_i8(builder, acc, w, a):
    """dot_i8 of weights that went through panel_i8"""
    return dot_panel_i8_value(builder, acc, w, a)


@vector_op(i32, i32, bytes_, bytes_)
def dot_u7(builder, acc, u, a):
    """acc + sum of 4 u * a within each lane; u in 0..127"""
    return dot_u7_value(builder, acc, u, a)


@vector_op(i32, i32, bytes_, bytes_, bytes_, bytes_)
def dot2_u6(builder, acc, u, a, v, b):
    """acc + the sum of 4 u * a and 4 v * b within each lane; u, v in 0..63"""
    if PAIR_SUMS:
        return add_pairs(builder, acc, builder.add(pair_products(builder, u, a), pair_products(builder, v, b)))
    return dot_u7_value(builder, dot_u7_value(builder, acc, u, a), v, b)


@vector_op(i32, i32, bytes_, bytes_)
def dot_i8(builder, acc, w, a):
    """acc + sum of 4 w * a + I8_BIAS * sum of 4 a within each lane"""
    return dot_i8_value(builder, acc, w, a)
