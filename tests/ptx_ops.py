"""What each PTX mnemonic computes, on NumPy arrays of registers: one entry a mnemonic, and no other mnemonic is known.

Sources: PTX ISA, "Instruction Set": "Integer Arithmetic", "Floating-Point", "Comparison and Selection", "Logic and Shift",
"Data Movement and Conversion" (mov, prmt, cvt). The approximate instructions err by what their page there allows at most,
all upwards or all downwards: `approximations(+1)`, `approximations(-1)`; exact special cases (0, infinity) stay exact.

    div.full.f32      2 ulp over the full range          ex2.approx.f32     2 ulp over the full range
    tanh.approx.f32   relative 2^-11                     rsqrt.approx.f32   relative 2^-22.9
    sqrt.approx.f32   relative 2^-23                     rcp.approx.f32     relative 2^-23
    lg2.approx.f32    absolute 2^-22 in (0.5, 2), relative 2^-22 elsewhere

All else is exact to the bit, but that ptxas may join an add and a mul with no rounding named into an fma: one rounding less.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

TYPES: dict[str, type] = {
    "pred": np.bool_,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


class Op(NamedTuple):
    result: str  # type
    sources: tuple[str, ...]  # types
    compute: Callable[..., Array]


def fma(a: Array, b: Array, c: Array) -> Array:
    """In fp64 the product is exact. The sum is rounded to odd there, so that rounding it again, to fp32, rounds as once."""
    product = a.astype(np.float64) * b
    rounded = product + c
    of_c = rounded - product
    error = (product - (rounded - of_c)) + (c - of_c)  # exact: Knuth's two-sum
    bits = rounded.view(np.int64)
    odd = (bits - ((error < 0) != (rounded < 0))) | 1  # towards zero, then the last bit
    return np.where((error != 0) & np.isfinite(rounded), odd, bits).view(np.float64).astype(np.float32)


def shift_left(a: Array, by: Array) -> Array:
    bits = a.itemsize * 8
    return np.where(by >= bits, a.dtype.type(0), a << np.minimum(by, bits - 1).astype(a.dtype))


def shift_right(a: Array, by: Array) -> Array:
    """Arithmetic for signed a, logical for unsigned; by more than its width as by its width."""
    bits = a.itemsize * 8
    beyond = a >> a.dtype.type(bits - 1) >> a.dtype.type(1) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(by >= bits, beyond, a >> np.minimum(by, bits - 1).astype(a.dtype))


def bit_field(a: Array, position: Array, length: Array) -> Array:
    """bfe: `length` bits of a from `position` on; of a signed a the last of them is the sign."""
    at, length = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
    field = (a.astype(np.int64) >> np.minimum(at, 63)) & ((np.int64(1) << np.minimum(length, 32)) - 1)
    if a.dtype.kind == "i":
        sign = (a.astype(np.int64) >> np.minimum(at + length - 1, 31)) & 1
        field = np.where(length > 0, field - (sign << np.minimum(length, 32)), 0)
    return field.astype(a.dtype)


def wide_bit_field(a: Array, position: Array, length: Array) -> Array:
    """bfe.u64."""
    at, length = ((n & 255).astype(np.uint64) for n in (position, length))
    one = np.uint64(1)
    mask = np.where(length > 63, ~np.uint64(0), (one << np.minimum(length, np.uint64(63))) - one)
    return np.where(at > 63, np.uint64(0), a >> np.minimum(at, np.uint64(63))) & mask


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four of the eight bytes of b and a; the high bit of a selector repeats the byte's sign."""
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.uint32(0)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (chosen & np.uint32(7))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(chosen & np.uint32(8) != 0, np.uint32(255) * (byte >> np.uint32(7)), byte)
        result = result | byte << np.uint32(8 * i)
    return result


def to_bf16(a: Array) -> Array:
    """To the nearest, ties to even; NaN is 0x7FFF."""
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(a: Array) -> Array:
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(a: Array) -> Array:
    return a.astype(np.float16)


def packed(half: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Two numbers, the first in the upper half."""

    def pack(upper: Array, lower: Array) -> Array:
        upper, lower = half(upper).view(np.uint16), half(lower).view(np.uint16)
        return upper.astype(np.uint32) << np.uint32(16) | lower.astype(np.uint32)

    return pack


def comparisons(kind: str) -> dict[str, Callable[[Array, Array], Array]]:
    """Of floats, an ordered comparison with NaN is false, and one ending in u is true."""
    plain = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    if kind != "f32":
        return plain
    found = {}
    for name, compare in plain.items():
        found[name] = lambda a, b, f=compare: f(a, b) & ~(np.isnan(a) | np.isnan(b))
        found[name + "u"] = lambda a, b, f=compare: f(a, b) | np.isnan(a) | np.isnan(b)
    return found


def exact() -> dict[str, Op]:
    ops: dict[str, Op] = {}

    def define(name: str, result: str, sources: str, compute: Callable[..., Array]) -> None:
        ops[name] = Op(result, tuple(sources.split()), compute)

    for t in (*INTEGERS, "f32"):
        for name, compute in (("add", np.add), ("sub", np.subtract)):
            define(f"{name}.{t}", t, f"{t} {t}", compute)
        lesser, greater = (np.fmin, np.fmax) if t == "f32" else (np.minimum, np.maximum)  # of a NaN and a number, the number
        define(f"min.{t}", t, f"{t} {t}", lesser)
        define(f"max.{t}", t, f"{t} {t}", greater)
        for name, compare in comparisons(t).items():
            define(f"setp.{name}.{t}", "pred", f"{t} {t}", compare)
    for t in ("b16", "b32", "b64"):
        for name in ("eq", "ne"):
            define(f"setp.{name}.{t}", "pred", f"{t} {t}", comparisons(t)[name])
    for t in INTEGERS:
        bits = 8 * np.dtype(TYPES[t]).itemsize
        define(f"mul.lo.{t}", t, f"{t} {t}", np.multiply)
        define(f"mad.lo.{t}", t, f"{t} {t} {t}", lambda a, b, c: a * b + c)
        define(f"shr.{t}", t, f"{t} u32", shift_right)
        if t in WIDE:
            wide = WIDE[t]

            def product(a: Array, b: Array, to: Any = TYPES[wide]) -> Array:
                return a.astype(to) * b.astype(to)

            define(f"mul.wide.{t}", wide, f"{t} {t}", product)
            define(f"mad.wide.{t}", wide, f"{t} {t} {wide}", lambda a, b, c, f=product: f(a, b) + c)
            define(f"mul.hi.{t}", t, f"{t} {t}", lambda a, b, f=product, n=bits, to=TYPES[t]: (f(a, b) >> n).astype(to))
        if t.startswith("s"):
            define(f"neg.{t}", t, t, np.negative)
            define(f"abs.{t}", t, t, np.abs)
        for source in INTEGERS:
            define(f"cvt.{t}.{source}", t, source, lambda a, to=TYPES[t]: a.astype(to))
    for t in ("pred", "b16", "b32", "b64"):
        define(f"and.{t}", t, f"{t} {t}", np.bitwise_and)
        define(f"or.{t}", t, f"{t} {t}", np.bitwise_or)
        define(f"xor.{t}", t, f"{t} {t}", np.bitwise_xor)
        define(f"not.{t}", t, t, np.invert)
        if t != "pred":
            define(f"shl.{t}", t, f"{t} u32", shift_left)
    for t in TYPES:
        define(f"mov.{t}", t, t, lambda a: a)
        if t != "pred":
            define(f"selp.{t}", t, f"{t} {t} pred", lambda a, b, p: np.where(p, a, b))
    for t in ("u32", "s32"):
        define(f"bfe.{t}", t, f"{t} u32 u32", bit_field)
        define(f"cvt.rn.f32.{t}", "f32", t, lambda a: a.astype(np.float32))
    define("bfe.u64", "u64", "u64 u32 u32", wide_bit_field)
    define("prmt.b32", "b32", "b32 b32 b32", permute)

    define("mul.f32", "f32", "f32 f32", np.multiply)
    define("neg.f32", "f32", "f32", np.negative)
    define("abs.f32", "f32", "f32", np.abs)
    define("fma.rn.f32", "f32", "f32 f32 f32", fma)
    define("div.rn.f32", "f32", "f32 f32", np.divide)
    define("sqrt.rn.f32", "f32", "f32", np.sqrt)
    for name in ("add", "sub", "mul"):
        ops[f"{name}.rn.f32"] = ops[f"{name}.f32"]

    define("cvt.f32.bf16", "f32", "bf16", from_bf16)
    define("cvt.f32.f16", "f32", "f16", lambda a: a.astype(np.float32))
    define("cvt.rn.bf16.f32", "bf16", "f32", to_bf16)
    define("cvt.rn.f16.f32", "f16", "f32", to_f16)
    define("cvt.rn.bf16x2.f32", "bf16x2", "f32 f32", packed(to_bf16))
    define("cvt.rn.f16x2.f32", "f16x2", "f32 f32", packed(to_f16))
    return ops


def flushed(a: Array) -> Array:
    """.ftz: a subnormal number is a zero of its sign."""
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)


def approximations(sign: int) -> dict[str, Op]:
    """The approximate instructions, each as wrong as it may be: magnitudes too large for sign +1, too small for -1."""

    def relative(f: Callable[..., Array], bound: float, *sources: Array) -> Array:
        return (f(*(a.astype(np.float64) for a in sources)) * (1 + sign * bound)).astype(np.float32)

    def ulps(f: Callable[..., Array], count: int, *sources: Array) -> Array:
        value = f(*(a.astype(np.float64) for a in sources)).astype(np.float32)
        bits = (value.view(np.int32) + np.int32(sign * count)).view(np.float32)
        return np.where(np.isfinite(value) & (np.abs(value) >= np.finfo(np.float32).tiny), bits, value)

    def logarithm(a: Array) -> Array:
        true = np.log2(a.astype(np.float64))
        return (true + sign * 2.0**-22 * np.where((a > 0.5) & (a < 2), 1, np.abs(true))).astype(np.float32)

    functions = {
        "ex2.approx": lambda a: np.where(a == 0, np.float32(1), ulps(np.exp2, 2, a)),
        "rsqrt.approx": lambda a: relative(lambda x: 1 / np.sqrt(x), 2**-22.9, a),
        "sqrt.approx": lambda a: relative(np.sqrt, 2.0**-23, a),
        "rcp.approx": lambda a: relative(np.reciprocal, 2.0**-23, a),
        "lg2.approx": logarithm,
        "tanh.approx": lambda a: np.where(np.isinf(a), np.sign(a), relative(np.tanh, 2.0**-11, a)),
    }
    ops = {"div.full.f32": Op("f32", ("f32", "f32"), lambda a, b: ulps(np.divide, 2, a, b))}
    for name, compute in functions.items():
        ops[f"{name}.f32"] = Op("f32", ("f32",), compute)
        if name != "tanh.approx":
            ops[f"{name}.ftz.f32"] = Op("f32", ("f32",), lambda a, f=compute: flushed(f(flushed(a))))
    return ops
