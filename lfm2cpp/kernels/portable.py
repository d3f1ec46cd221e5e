"""What not every CPU has an instruction for: float16, and a * b + c with one rounding. For values and for vectors.

Without the instruction LLVM would call a function of some C runtime, which may not be there, an element at a time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from . import level

_TARGET = level.target()
I32, FLOAT = ir.IntType(32), ir.FloatType()


def _like(shape: ir.Type, element: ir.Type) -> ir.Type:
    return ir.VectorType(element, shape.count) if isinstance(shape, ir.VectorType) else element


def _constant(shape: ir.Type, element: ir.Type, value: float) -> ir.Constant:
    one = ir.Constant(element, value)
    return ir.Constant(_like(shape, element), [one] * shape.count) if isinstance(shape, ir.VectorType) else one


def half_to_float(builder: ir.IRBuilder, value: ir.Value, floats: ir.Type) -> ir.Value:
    """float16 -> float32, exactly."""
    if _TARGET.has_half:
        return builder.fpext(value, floats)
    ints = _like(floats, I32)

    def number(n: int) -> ir.Constant:
        return _constant(floats, I32, n)

    bits = builder.zext(builder.bitcast(value, _like(floats, ir.IntType(16))), ints)
    sign = builder.shl(builder.and_(bits, number(0x8000)), number(16))
    rest = builder.shl(builder.and_(bits, number(0x7FFF)), number(13))
    # The exponent's bias is 112 less; a multiplication corrects it, of subnormal numbers too.
    scaled = builder.bitcast(builder.fmul(builder.bitcast(rest, floats), _constant(floats, FLOAT, 2.0**112)), ints)
    is_finite = builder.icmp_unsigned("<", rest, number(0x7C00 << 13))
    magnitude = builder.select(is_finite, scaled, builder.or_(rest, number(0x7F800000)))
    return builder.bitcast(builder.or_(magnitude, sign), floats)


def float_to_half(builder: ir.IRBuilder, value: ir.Value, halves: ir.Type) -> ir.Value:
    """float32 -> float16, to nearest even."""
    if _TARGET.has_half:
        return builder.fptrunc(value, halves)
    floats, ints = value.type, _like(value.type, I32)

    def number(n: int) -> ir.Constant:
        return _constant(floats, I32, n)

    bits = builder.bitcast(value, ints)
    a = builder.and_(bits, number(0x7FFFFFFF))
    sign = builder.lshr(builder.and_(bits, number(0x80000000)), number(16))
    # Normal: 112 off the exponent, half of the last place added (a bit less where it is even), the rest cut off.
    is_odd = builder.and_(builder.lshr(a, number(13)), number(1))
    normal = builder.lshr(builder.add(builder.add(a, number(0xC8000FFF)), is_odd), number(13))
    # Subnormal: adding 0.5 leaves the rounded number in the last bits of the sum.
    shifted = builder.fadd(builder.bitcast(a, floats), _constant(floats, FLOAT, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, ints), number(0x3F000000))
    is_nan = builder.icmp_unsigned(">", a, number(0x7F800000))
    large = builder.select(is_nan, number(0x7E00), number(0x7C00))
    small = builder.select(builder.icmp_unsigned("<", a, number(113 << 23)), subnormal, normal)
    result = builder.select(builder.icmp_unsigned("<", a, number(143 << 23)), small, large)
    shorts = builder.trunc(builder.or_(result, sign), _like(floats, ir.IntType(16)))
    return builder.bitcast(shorts, halves)


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c; rounded once where the CPU can, else twice."""
    if not _TARGET.has_fma:
        return builder.fadd(builder.fmul(a, b), c)
    suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    return builder.call(_declared(builder, f"llvm.fma.{suffix}", ir.FunctionType(a.type, [a.type] * 3)), [a, b, c])


def _declared(builder: ir.IRBuilder, name: str, function_type: ir.FunctionType) -> Any:
    module = builder.module
    return module.globals.get(name) or ir.Function(module, function_type, name)
