"""The functions of native.c, where built and where this CPU can run them: bfloat16 on x86-64, AVX512-BF16 and -VNNI.

Every function here takes and gives tensors, checks nothing, and does what its namesake in torch operators does
(cpu.py, quant.py); what is added in float32 there is added in float32 here, in another order.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..quant import GROUP, Bits, Quantised, shapes
from ..slots import LayerCache, LayerRows

Rotation = tuple[Tensor, Tensor]
FILE = Path(__file__).with_name("_native.so")
TILE = 16  # rows of 4-bit weights that lie together
SLOTS_AT_ONCE = 256  # that a thread attends to
PANEL = 64  # rows that oneDNN puts together
MOST_ROWS = 8  # vectors that a product takes at once

_ARGUMENTS = {  # p: a pointer, i: an int64, f: a float
    "quantise8": "pppii",
    "quantise4": "pppii",
    "int4_pack": "ppppii",
    "int4_panels": "pppiii",
    "int4_many": "ppppppiii",
    "attend": "ppipipp",
    "step": "ppppp",
    "linear": "pppi",
    "layer": "ppp",
    "rms_norm": "ppppiif",
    "gated": "ppii",
    "rotate": "pipppiii",
    "round": "pppii",
}


class Slots(ctypes.Structure):
    """A layer's slots and where in its life it is, for one token a row; explained in native.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values", "positions", "free", "now")),
        *((name, c_int64) for name in ("window", "sinks", "rows", "kv_heads", "slots", "every", "reach", "dim")),
        *((name, c_int64) for name in ("heads", "amx")),
        *((name, c_void_p) for name in ("which", "cos", "sin", "far_cos", "far_sin")),
    ]


class Linear(ctypes.Structure):
    """A linear layer for few rows of activations: one of the FORMS, its shape, and where its weights are."""

    _fields_ = [
        *((name, c_int64) for name in ("form", "n", "k")),
        *((name, c_void_p) for name in ("weights", "scales", "shifts", "bias")),
    ]


class Layer(ctypes.Structure):
    """The linear layers and norms of a layer."""

    _fields_ = [
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("norm", "post")),
        *((name, c_float) for name in ("norm_eps", "post_eps")),
    ]


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not FILE.is_file():
        return "it was not built: no C compiler was there at installation, or another system than Linux on x86-64"
    try:
        library = ctypes.CDLL(str(FILE))
    except OSError as error:
        return f"it cannot be loaded ({error}); install minillm again"
    if not library.minillm_runs():
        return "this CPU lacks AVX512-BF16 or AVX512-VNNI"
    kinds = {"p": c_void_p, "i": c_int64, "f": c_float}
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, "minillm_" + name)  # kept by the library, as [] would not
        function.argtypes, function.restype = [kinds[kind] for kind in arguments], None
    return library


def missing() -> str | None:
    """Why native.c does not run here; None where it does."""
    library = _library()
    return library if isinstance(library, str) else None


@cache
def has_amx() -> bool:
    """Whether `int4_many` runs: an Intel CPU with AMX, and a system that grants it."""
    library = _library()
    return isinstance(library, ctypes.CDLL) and bool(library.minillm_runs_amx())


@cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    library = _library()
    assert isinstance(library, ctypes.CDLL), library
    function: ctypes._NamedFuncPointer = getattr(library, "minillm_" + name)
    return function


def quantise(weight: Tensor, bits: Bits) -> Quantised:
    """What `quant.quantise` makes of a bfloat16 weight [N, K], K a multiple of 32."""
    rows, width = weight.shape
    made = {name: weight.new_empty(shape, dtype=kind) for name, (shape, kind) in shapes(rows, width, bits).items()}
    _function(f"quantise{bits}")(weight.data_ptr(), made["codes"].data_ptr(), made["scales"].data_ptr(), rows, width)
    return Quantised(made["codes"], made["scales"])


def pack_int4(weight: Quantised) -> tuple[Tensor, Tensor]:
    """4-bit weights [N, K], N a multiple of 16, as `int4_linear` reads them.

    Codes uint8 [N / 16, K / 8, 16, 4]: sixteen rows together, eight weights of each in four bytes, the even ones in the
    first two; scales bfloat16 [N / 16, K / 32, 16].
    """
    rows, width = weight.shape
    codes = weight.codes.new_empty(rows // TILE, width // 8, TILE, 4)
    scales = weight.scales.new_empty(rows // TILE, width // GROUP, TILE)
    _function("int4_pack")(
        weight.codes.data_ptr(), weight.scales.data_ptr(), codes.data_ptr(), scales.data_ptr(), rows, width
    )
    return codes, scales


def panels(packed: Tensor, weight: Tensor) -> int | None:
    """The address of a weight [N, K], bfloat16 or int8, that oneDNN has packed, if it lies as native.c reads it.

    That is in panels of 64 rows, 4 bytes of each in turn: [N / 64, K / 2 or K / 4, 64, 2 or 4].

    How oneDNN packs depends on the CPU and its version, and is not to be asked; hence the first and last panel are
    compared.
    """
    rows, width = weight.shape
    together = 4 // weight.element_size()
    known = torch._C._jit_get_schemas_for_operator("mkldnn::data_ptr")  # not in every torch
    if missing() is not None or rows % PANEL or width % together or not known:
        return None
    address, size = int(torch.ops.mkldnn.data_ptr(packed)), int(torch.ops.mkldnn._nbytes(packed))
    if size < weight.nbytes:
        return None
    of_panel = PANEL * width * weight.element_size()
    for first in (0, rows - PANEL):
        at = address + first * width * weight.element_size()
        found = torch.frombuffer((ctypes.c_char * of_panel).from_address(at), dtype=weight.dtype)
        expected = weight[first : first + PANEL].view(PANEL, -1, together).transpose(0, 1).flatten()
        if not torch.equal(found, expected):
            return None
    return address


FORMS = ("pairs", "rounded", "whole", "nibbles")


def form(
    kind: str,
    shape: tuple[int, int],
    weights: int,
    scales: Tensor | None = None,
    shifts: Tensor | None = None,
    bias: Tensor | None = None,
) -> Linear | None:
    """A layer that `linear` multiplies, or None.  The tensors are the caller's to keep.

    pairs    weights bfloat16 [N, K] in `panels`
    rounded  weights int8 in panels, scales float32 [N], shifts int32 [N]: 128 times the sum of a row; x is rounded
    whole    weights int8 [N, K], scales float32 [N]
    nibbles  weights and scales as `pack_int4` gives them
    """
    if shape[1] % 32 or (bias is not None and bias.dtype != torch.bfloat16):
        return None
    parts = (None if part is None else part.data_ptr() for part in (scales, shifts, bias))
    return Linear(FORMS.index(kind), *shape, weights, *parts)


def linear(form: Linear, x: Tensor) -> Tensor:
    """x [M, K] bfloat16, M at most 8, times a weight [N, K] -> [M, N]."""
    y = x.new_empty(x.shape[0], form.n)  # [M, N]
    _function("linear")(ctypes.byref(form), x.data_ptr(), y.data_ptr(), x.shape[0])
    return y


def int4_many(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The same for any M and N a multiple of 32, with AMX and the weights rounded to bfloat16 on the way."""
    rows, width, out = x.shape[0], x.shape[1], codes.shape[0] * TILE
    y = x.new_empty(rows, out)  # [M, N]
    squares = x.new_empty(-(-rows // 32) * 32, width)  # x, in another order
    weights = x.new_empty(torch.get_num_threads(), 32, width)
    _function("int4_many")(
        x.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        y.data_ptr(),
        squares.data_ptr(),
        weights.data_ptr(),
        rows,
        out,
        width,
    )
    return y


def int4_panels(codes: Tensor, scales: Tensor, start: int, stop: int, address: int) -> None:
    """Rows start..stop, multiples of 16, of packed weights [N, K] as bfloat16 into `panels` at that address."""
    width = scales.shape[1] * GROUP
    _function("int4_panels")(codes.data_ptr(), scales.data_ptr(), address, start // TILE, stop // TILE, width)


def attend(
    q: Tensor,
    far: Tensor | None,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    now: Tensor,
    *,
    reach: int,
    window: int,
    sinks: int,
) -> Tensor:
    """Attention of one token a row: q, far [B, H, 1, D] over the first `reach` slots of a layer -> [B, H, 1, D].

    keys, values [B, Hkv, S, D] bfloat16, positions int32 [B, Hkv, S].  The query at position now [B, 1] sees positions
    > now - window, and `sinks` from any distance; these are asked with `far` where it is given.
    """
    batch, heads, _, dim = q.shape
    q = q if q.stride(1) == dim else q.contiguous()  # the heads of a row lie side by side
    far = far if far is None or far.stride(1) == dim else far.contiguous()
    out = q.new_empty(batch, heads, 1, dim)
    slots = Slots(keys.data_ptr(), values.data_ptr(), positions.data_ptr(), None, now.data_ptr(), window, sinks, batch)
    slots.kv_heads, slots.slots, slots.reach, slots.dim = keys.shape[1], keys.shape[2], reach, dim
    slots.heads, slots.amx = heads, has_amx()
    parts = _parts(q, slots)
    _function("attend")(
        ctypes.byref(slots),
        q.data_ptr(),
        q.stride(0),
        None if far is None else far.data_ptr(),
        0 if far is None else far.stride(0),
        out.data_ptr(),
        parts.data_ptr(),
    )
    return out


def step(
    qkv: Tensor,
    rotation: Rotation,
    far: Rotation | None,
    layer: LayerCache | LayerRows,
    now: Tensor,
    *,
    heads: int,
    reach: int,
) -> Tensor:
    """One token a row, from qkv [B, (H + 2 Hkv) * D] to what it attends to [B, H * D]: turned, written, attended.

    rotation, far: cos and sin [B, 1, 1, D] for positions now [B, 1]; far: for what asks the sinks.  Nothing may be due
    to be evicted.
    """
    slots = _slots(rotation, far, layer, now, heads, reach)
    queries = qkv.new_empty(2 * slots.rows * heads * slots.dim)
    out = qkv.new_empty(slots.rows, heads * slots.dim)
    parts = _parts(qkv, slots)
    _function("step")(ctypes.byref(slots), qkv.data_ptr(), queries.data_ptr(), out.data_ptr(), parts.data_ptr())
    return out


def whole_layer(
    x: Tensor,
    parts: Layer,
    rotation: Rotation,
    far: Rotation | None,
    layer: LayerCache | LayerRows,
    now: Tensor,
    *,
    heads: int,
    reach: int,
) -> None:
    """One token a row, x [B, hidden], through a layer: the products of `parts` around a `step`; changes x."""
    slots = _slots(rotation, far, layer, now, heads, reach)
    _function("layer")(ctypes.byref(parts), ctypes.byref(slots), x.data_ptr())


def _slots(
    rotation: Rotation, far: Rotation | None, layer: LayerCache | LayerRows, now: Tensor, heads: int, reach: int
) -> Slots:
    which, layer = (layer.rows, layer.whole) if isinstance(layer, LayerRows) else (None, layer)
    _, kv_heads, slots, dim = layer.keys.shape
    return Slots(
        layer.keys.data_ptr(),
        layer.values.data_ptr(),
        layer.positions.data_ptr(),
        layer.free.data_ptr(),
        now.data_ptr(),
        1 << 31 if layer.window is None else layer.window,
        layer.retention.sinks if layer.far else 0,
        len(now),
        kv_heads,
        slots,
        layer.retention.evict_every,
        reach,
        dim,
        heads,
        has_amx(),
        None if which is None else which.data_ptr(),
        rotation[0].data_ptr(),
        rotation[1].data_ptr(),
        None if far is None else far[0].data_ptr(),
        None if far is None else far[1].data_ptr(),
    )


def _parts(like: Tensor, slots: Slots) -> Tensor:
    """Room for what the blocks of slots give, before it is put together."""
    cuts = -(-slots.reach // SLOTS_AT_ONCE)
    return like.new_empty(slots.rows * slots.heads * cuts * (slots.dim + 2), dtype=torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """x [..., size] += delta, where there is one; the normalised x."""
    size = x.shape[-1]
    y = torch.empty_like(x)
    add = None if delta is None else delta.data_ptr()
    _function("rms_norm")(x.data_ptr(), add, weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps)
    return y


def gated(x: Tensor) -> Tensor:
    """Gate and up [..., 2 I] -> silu(gate) * up [..., I]."""
    size = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], size)
    _function("gated")(x.data_ptr(), y.data_ptr(), y.numel() // size, size)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x [B, T, n, D], a part of a wider [B, T, m, D], turned by cos and sin [B, 1, T, D] -> [B, n, T, D]."""
    batch, tokens, heads, dim = x.shape
    y = x.new_empty(batch, tokens, heads, dim)
    _function("rotate")(
        x.data_ptr(), x.stride(1), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), batch * tokens, heads, dim
    )
    return y.transpose(1, 2)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> uint8 [M, K], 128 for zero, and scales float32 [M, 1]."""
    codes, scales = torch.empty_like(x, dtype=torch.uint8), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    _function("round")(x.data_ptr(), codes.data_ptr(), scales.data_ptr(), x.shape[0], x.shape[1])
    return codes, scales
