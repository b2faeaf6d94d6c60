"""What stands between linear layers: the kernels of triton.py for norms, rotary positions and gates."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, delta, weight, out, size, eps, SIZE: tl.constexpr):
    """One row of x [M, size], which grows by delta first where there is one: scaled to unit root mean square."""
    n = tl.arange(0, SIZE)
    here, real = tl.program_id(0).to(tl.int64) * size + n, n < size
    number = tl.load(x + here, real, other=0)
    if delta is not None:
        number = (number.to(tl.float32) + tl.load(delta + here, real, other=0).to(tl.float32)).to(number.dtype)
        tl.debug_barrier()  # a narrow row is loaded by more than one thread for each number
        tl.store(x + here, number, real)
    number = number.to(tl.float32)
    scaled = number * tl.rsqrt(tl.sum(number * number, 0) / size + eps)
    tl.store(out + here, scaled * tl.load(weight + n, real, other=0).to(tl.float32), real)


@triton.jit
def gated(x, out, size, BLOCK: tl.constexpr):
    """Gate and up, a row of x [M, 2 * size], become silu(gate) * up, a row of out [M, size]."""
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * 2 * size + n, n < size, other=0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + n, n < size, other=0).to(tl.float32)
    fading = tl.exp(-tl.abs(gate))  # which never overflows
    tl.store(out + row * size + n, gate * tl.where(gate < 0, fading, 1.0) / (1 + fading) * up, n < size)


@triton.jit
def rotate(x, cos, sin, out, stride, heads, tokens, dim, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Some heads of one token of x [B * T, heads, D], whose tokens lie `stride` apart, into out [B, heads, T, D]; see
    `model.rotate`.
    """
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, DIM)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [n]
    real = (head < heads)[:, None] & (d < dim)[None, :]
    source = x + token * stride + head[:, None] * dim  # [n, 1]
    number = tl.load(source + d[None, :], real, other=0).to(tl.float32)  # [n, D]
    partner = tl.load(source + ((d + dim // 2) % dim)[None, :], real, other=0).to(tl.float32)
    by = tl.load(cos + token * dim + d, d < dim, other=0).to(tl.float32)[None, :]  # [1, D]
    across = tl.load(sin + token * dim + d, d < dim, other=0).to(tl.float32)[None, :]
    target = ((token // tokens * heads + head) * tokens + token % tokens)[:, None] * dim + d[None, :]
    tl.store(out + target, number * by + partner * across, real)
