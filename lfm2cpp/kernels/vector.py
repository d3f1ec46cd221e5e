"""Vectors as Numba values: the types, their operators, and how an intrinsic over them is declared.

A vector is an LLVM vector held in a local variable; LLVM allocates the register. `a + b`, `a * b`, `a & b`, `a >> 4`
work lane by lane. The package simd adds the words that make up the vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

ELEMENTS: dict[str, ir.Type] = {
    "f32": ir.FloatType(),
    "f16": ir.HalfType(),
    "i32": ir.IntType(32),
    "i16": ir.IntType(16),
    "i8": ir.IntType(8),
    "i1": ir.IntType(1),  # a mask
}


class Vec(types.Type):
    """`lanes` elements of one kind, e.g. f32x16."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(ELEMENTS[self.element], self.lanes)


@register_model(Vec)
class VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


Codegen = Callable[..., ir.Value]


def vector_op(result: types.Type, *parameters: types.Type) -> Callable[[Codegen], Any]:
    """Declare an intrinsic by its types; the decorated function gets (builder, *LLVM values) and returns one.

    A void result is declared as types.void, and the function's own result is then ignored.
    """

    def declare(generate: Codegen) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            value = generate(builder, *args)
            return context.get_dummy_value() if result is types.void else value

        names = ", ".join(f"a{i}" for i in range(len(parameters)))
        scope: dict[str, Any] = {"sig": result(*parameters), "codegen": codegen}
        exec(f"def op(typingctx, {names}):\n    return sig, codegen\n", scope)  # noqa: S102
        op = scope["op"]
        op.__doc__, op.__name__ = generate.__doc__, generate.__name__
        return intrinsic(op)

    return declare


def call_llvm(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic by its full, mangled name."""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def constant(vector: ir.VectorType, value: Any) -> ir.Constant:
    """A vector with the same value in every lane, or with the values of a list."""
    values = value if isinstance(value, list) else [value] * vector.count
    return ir.Constant(vector, [ir.Constant(vector.element, v) for v in values])


def pack(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    """Values of one type as a types.UniTuple: what a word returns, or a tile (tile.py)."""
    several = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        several = builder.insert_value(several, value, i)
    return several


def unpack(builder: ir.IRBuilder, several: ir.Value) -> list[ir.Value]:
    return [builder.extract_value(several, i) for i in range(several.type.count)]


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    """Pick lanes from a (0..n-1) and b (n..2n-1)."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    vector = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return shuffle(builder, one, ir.Constant(vector, ir.Undefined), [0] * lanes)


_FLOAT_OPS = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
_INT_OPS = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.and_: "and_",
    operator.or_: "or_", operator.xor: "xor",
}  # fmt: skip
_SHIFTS = {operator.rshift: "lshr", operator.lshift: "shl"}


def _register_operator(python_op: Any) -> None:
    @infer_global(python_op)
    class VectorOperator(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vec):
                if args[0] == args[1] and python_op not in _SHIFTS:
                    return signature(args[0], args[0], args[0])
                if python_op in _SHIFTS and isinstance(args[1], types.Integer):
                    return signature(args[0], args[0], types.int64)
            return None

    if python_op in _SHIFTS:

        @lower_builtin(python_op, Vec, types.Integer)
        def lower_shift(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            vector = sig.return_type.llvm
            amount = splat(builder, builder.trunc(args[1], vector.element), vector.count)
            return getattr(builder, _SHIFTS[python_op])(args[0], amount)

        return

    @lower_builtin(python_op, Vec, Vec)
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        is_float = sig.return_type.element[0] == "f"
        return getattr(builder, (_FLOAT_OPS if is_float else _INT_OPS)[python_op])(*args)


for _op in {*_FLOAT_OPS, *_INT_OPS, *_SHIFTS}:
    _register_operator(_op)
