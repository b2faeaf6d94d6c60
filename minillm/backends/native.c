// The few loops that torch has no operator for: 4-bit products, attention of one token over slots, and what surrounds
// the linear layers.  Built by tools/build_native.py when minillm is installed and a C compiler is there; absent
// otherwise, and torch operators do the same, slower.  native.py calls these functions and says what each means.
//
// Everything is bfloat16 (bf16, 16 bits) outside and float32 inside.  All of it wants AVX-512 with BF16: minillm_runs()
// says whether this CPU has it, and nothing else may be called where not.  Threads are OpenMP's, of torch's own runtime:
// the library is linked to none, so that there are no two pools of threads on the same cores.

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

#define KERNEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")))
#define INLINE KERNEL static inline __attribute__((always_inline))

int minillm_runs(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// ---- numbers ----

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

INLINE __m512 load16(const bf16 *x) { return widen(_mm256_loadu_si256((const __m256i *)x)); }

INLINE void store16(bf16 *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

INLINE __m512bh load32(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); }

INLINE float of_bf16(bf16 x) { return _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32((int32_t)x << 16))); }

// e^x to about 2 units of float32's last place, for x <= 0.
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-105.0f), x); // far below, the polynomial would overflow; NaN stays NaN
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// The sums of 16 vectors, as one vector: a transpose that adds on the way.
INLINE __m512 sums(const __m512 *r) {
    __m512 t[8], u[4];
    for (int i = 0; i < 8; i++) t[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xDD));
    __m512 w = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xDD));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v, w, 0x88), _mm512_shuffle_f32x4(v, w, 0xDD));
}

// 4 x 4 transposes, of 32-bit numbers in every quarter, and of the quarters themselves.
INLINE void transpose32(const __m512i *x, __m512i *y) {
    __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    y[0] = _mm512_unpacklo_epi64(a, c), y[1] = _mm512_unpackhi_epi64(a, c);
    y[2] = _mm512_unpacklo_epi64(b, d), y[3] = _mm512_unpackhi_epi64(b, d);
}

INLINE void transpose128(const __m512i *x, __m512i *y) {
    __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[0], x[1], 0xEE);
    __m512i c = _mm512_shuffle_i32x4(x[2], x[3], 0x44), d = _mm512_shuffle_i32x4(x[2], x[3], 0xEE);
    y[0] = _mm512_shuffle_i32x4(a, c, 0x88), y[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
    y[2] = _mm512_shuffle_i32x4(b, d, 0x88), y[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}

// 16 x 16 numbers, rows to columns.
INLINE void transpose16(const __m512i *x, __m512i *y) {
    __m512i parts[16];
    for (int i = 0; i < 4; i++) transpose32(x + 4 * i, parts + 4 * i);
    for (int i = 0; i < 4; i++) {
        __m512i four[4] = {parts[i], parts[4 + i], parts[8 + i], parts[12 + i]}, columns[4];
        transpose128(four, columns);
        for (int j = 0; j < 4; j++) y[4 * j + i] = columns[j];
    }
}

// ---- 4-bit weights ----
// Sixteen rows lie together: for every 8 weights of a row one 32-bit lane, its low half the nibbles of weights 0, 2, 4, 6
// and its high half those of 1, 3, 5, 7.  Shifted by 4 j, each half starts with the nibbles of weights 2 j and 2 j + 1, and
// vpermw, which looks at 5 bits of each half, turns them into the pair of bf16 that vdpbf16ps multiplies; bit 5 belongs
// to the next nibble, so the table is there twice.

#define GROUP 32 // weights that share a scale
#define TILE 16  // rows that lie together
#define AHEAD 2048 // bytes to fetch before they are needed: without it memory is read at half its speed

INLINE __m512i nibble_table(void) {
    static const bf16 values[16] = {0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, // -8 .. -1
                                    0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0}; // 0 .. 7
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values));
}

static inline uint32_t every_second_nibble(uint32_t x) {
    x &= 0x0F0F0F0F;
    x = (x | x >> 4) & 0x00FF00FF;
    return (x | x >> 8) & 0xFFFF;
}

// Codes [n, k / 2] and scales [n, k / 32], as a checkpoint has them, into tiles.
KERNEL void minillm_int4_pack(const uint8_t *codes, const bf16 *scales, uint32_t *lanes, bf16 *tiled, int64_t n, int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < n / TILE; tile++) {
        for (int64_t i = 0; i < k / 8; i++)
            for (int64_t r = 0; r < TILE; r++) {
                uint32_t eight;
                memcpy(&eight, codes + (tile * TILE + r) * k / 2 + i * 4, 4);
                lanes[(tile * k / 8 + i) * TILE + r] = every_second_nibble(eight) | every_second_nibble(eight >> 4) << 16;
            }
        for (int64_t g = 0; g < k / GROUP; g++)
            for (int64_t r = 0; r < TILE; r++) tiled[(tile * k / GROUP + g) * TILE + r] = scales[(tile * TILE + r) * k / GROUP + g];
    }
}

// One tile of 16 rows times `rows` vectors x [rows, K]: the weights are unpacked once for all of them.
INLINE void int4_tile(const bf16 *x, const uint8_t *codes, const bf16 *scales, bf16 *y, int rows, int64_t n, int64_t k) {
    const __m512i table = nibble_table();
    __m512 total[8];
    for (int m = 0; m < rows; m++) total[m] = _mm512_setzero_ps();
    for (int64_t g = 0; g < k / GROUP; g++) {
        __m512 sum[8][2];
        for (int m = 0; m < rows; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
        _mm_prefetch((const char *)(scales + g * TILE) + AHEAD / 8, _MM_HINT_T0);
        for (int i = 0; i < 4; i++) {
            __m512i lanes = _mm512_loadu_si512(codes + (g * 4 + i) * 64);
            _mm_prefetch((const char *)codes + (g * 4 + i) * 64 + AHEAD, _MM_HINT_T0);
            for (int j = 0; j < 4; j++) {
                __m512bh pair = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi32(lanes, 4 * j), table);
                for (int m = 0; m < rows; m++) {
                    int32_t both;
                    memcpy(&both, x + m * k + g * GROUP + i * 8 + j * 2, 4);
                    sum[m][j & 1] = _mm512_dpbf16_ps(sum[m][j & 1], pair, (__m512bh)_mm512_set1_epi32(both));
                }
            }
        }
        __m512 scale = load16(scales + g * TILE);
        for (int m = 0; m < rows; m++) total[m] = _mm512_fmadd_ps(_mm512_add_ps(sum[m][0], sum[m][1]), scale, total[m]);
    }
    for (int m = 0; m < rows; m++) store16(y + m * n, total[m]);
}

// y [m, n] = x [m, k] W^T for 1..8 rows.  codes: n / 16 tiles of k / 8 x 16 lanes; scales: n / 16 tiles of k / 32 x 16.
KERNEL static void multiply_nibbles(const bf16 *x, const uint8_t *codes, const bf16 *scales, bf16 *y, int64_t m, int64_t n, int64_t k) {
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < n / TILE; tile++) {
        const uint8_t *c = codes + tile * TILE * k / 2;
        const bf16 *s = scales + tile * TILE * k / GROUP;
        bf16 *to = y + tile * TILE;
        switch (m) {
        case 1: int4_tile(x, c, s, to, 1, n, k); break;
        case 2: int4_tile(x, c, s, to, 2, n, k); break;
        case 3: int4_tile(x, c, s, to, 3, n, k); break;
        case 4: int4_tile(x, c, s, to, 4, n, k); break;
        case 5: int4_tile(x, c, s, to, 5, n, k); break;
        case 6: int4_tile(x, c, s, to, 6, n, k); break;
        case 7: int4_tile(x, c, s, to, 7, n, k); break;
        default: int4_tile(x, c, s, to, 8, n, k);
        }
    }
}

// One tile as numbers, 16 rows side by side: 32 bf16 at a time, a pair of each row, the next pairs `stride` further on.
KERNEL static void int4_pairs(const uint8_t *codes, const bf16 *scales, bf16 *out, int64_t k, int64_t stride) {
    static const bf16 order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i table = nibble_table(), interleave = _mm512_loadu_si512(order), high = _mm512_set1_epi32(0xFFFF0000);
    for (int64_t g = 0; g < k / GROUP; g++) {
        __m512 scale = load16(scales + g * TILE);
        for (int i = 0; i < 4; i++) {
            __m512i lanes = _mm512_loadu_si512(codes + (g * 4 + i) * 64);
            _mm_prefetch((const char *)codes + (g * 4 + i) * 64 + AHEAD, _MM_HINT_T0);
            for (int j = 0; j < 4; j++) {
                __m512i pair = _mm512_permutexvar_epi16(_mm512_srli_epi32(lanes, 4 * j), table);
                __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), scale);
                __m512 odd = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, high)), scale);
                __m512i both = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
                _mm512_storeu_si512(out + (g * 16 + i * 4 + j) * stride, both);
            }
        }
    }
}

#define PANEL 64 // rows that oneDNN puts together, see below

// Tiles first .. last as numbers, in panels of 64 rows, into which oneDNN packs bf16: out [(last - first) / 4, k / 2, 64, 2].
KERNEL void minillm_int4_panels(const uint8_t *codes, const bf16 *scales, bf16 *out, int64_t first, int64_t last, int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t tile = first; tile < last; tile++) {
        int64_t panel = (tile - first) / (PANEL / TILE), quarter = (tile - first) % (PANEL / TILE);
        int4_pairs(codes + tile * TILE * k / 2, scales + tile * TILE * k / GROUP, out + panel * PANEL * k + quarter * 2 * TILE, k, 2 * PANEL);
    }
}

// ---- making quantised weights: quant.py says what the numbers mean ----

// codes int8 [rows, k], scales float32 [rows] of weights [rows, k].
KERNEL void minillm_quantise8(const bf16 *weights, int8_t *codes, float *scales, int64_t rows, int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const bf16 *row = weights + r * k;
        __m512 largest = _mm512_set1_ps(1e-30f);
        for (int64_t i = 0; i < k; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(load16(row + i)));
        scales[r] = _mm512_reduce_max_ps(largest) / 127.0f;
        for (int64_t i = 0; i < k; i += 16) {
            __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(load16(row + i), _mm512_set1_ps(scales[r])));
            _mm_storeu_si128((__m128i *)(codes + r * k + i), _mm512_cvtsepi32_epi8(code));
        }
    }
}

// codes uint8 [rows, k / 2], scales bf16 [rows, k / 32] of weights [rows, k].
KERNEL void minillm_quantise4(const bf16 *weights, uint8_t *codes, bf16 *scales, int64_t rows, int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t g = 0; g < rows * k / GROUP; g++) {
        __m512 part[2] = {load16(weights + g * GROUP), load16(weights + g * GROUP + 16)};
        float low = _mm512_reduce_min_ps(_mm512_min_ps(part[0], part[1])), high = _mm512_reduce_max_ps(_mm512_max_ps(part[0], part[1]));
        float scale = (-low >= high ? low : high) / -8.0f;
        if (scale == 0) scale = 1e-30f;
        __m512 products = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int i = 0; i < 2; i++) {
            __m512 code = _mm512_roundscale_ps(_mm512_div_ps(part[i], _mm512_set1_ps(scale)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            code = _mm512_min_ps(_mm512_max_ps(code, _mm512_set1_ps(-8)), _mm512_set1_ps(7));
            products = _mm512_fmadd_ps(part[i], code, products);
            squares = _mm512_fmadd_ps(code, code, squares);
            __m512i nibbles = _mm512_cvtps_epi32(_mm512_add_ps(code, _mm512_set1_ps(8)));
            __m512i pairs = _mm512_or_si512(nibbles, _mm512_srli_epi64(nibbles, 28)); // two lanes into the lower one
            _mm_storel_epi64((__m128i *)(codes + g * 16 + i * 8), _mm512_cvtepi64_epi8(pairs));
        }
        float best = _mm512_reduce_add_ps(products) / fmaxf(_mm512_reduce_add_ps(squares), 1.0f);
        bf16 narrow[16];
        store16(narrow, _mm512_set1_ps(best));
        scales[g] = narrow[0];
    }
}

// ---- 16- and 8-bit weights, as oneDNN packs them ----
// 64 rows lie together, a panel: 4 bytes of the first row (two bf16, or four int8), 4 of the second, ... of the 64th, then
// their next 4 bytes.  So 16 rows fill a register, and the 4 bytes of x that all of them meet are in every lane of another.

// One panel times `rows` vectors of `lanes` x 4 bytes.  eight: int8 weights and x in uint8, else pairs of bf16.
INLINE void panel_sums(const void *x, const uint8_t *weights, int rows, int64_t lanes, int eight, __m512i sum[4][4]) {
    const int64_t ahead = __builtin_cpu_is("amd") ? 0 : AHEAD; // an EPYC, left alone, is 6% faster at this
    for (int m = 0; m < rows; m++)
        for (int q = 0; q < 4; q++) sum[m][q] = _mm512_setzero_si512();
    for (int64_t i = 0; i < lanes; i++)
        for (int q = 0; q < 4; q++) {
            const uint8_t *at = weights + (i * 4 + q) * 64;
            __m512i w = _mm512_loadu_si512(at);
            _mm_prefetch((const char *)at + ahead, _MM_HINT_T0);
            for (int m = 0; m < rows; m++) {
                int32_t four;
                memcpy(&four, (const uint8_t *)x + (m * lanes + i) * 4, 4);
                __m512i every = _mm512_set1_epi32(four);
                sum[m][q] = eight ? _mm512_dpbusd_epi32(sum[m][q], every, w)
                                  : (__m512i)_mm512_dpbf16_ps((__m512)sum[m][q], (__m512bh)w, (__m512bh)every);
            }
        }
}

INLINE void bf16_panel(const bf16 *x, const bf16 *weights, bf16 *y, int rows, int64_t n, int64_t k) {
    __m512i sum[4][4];
    panel_sums(x, (const uint8_t *)weights, rows, k / 2, 0, sum);
    for (int m = 0; m < rows; m++)
        for (int q = 0; q < 4; q++) store16(y + m * n + 16 * q, (__m512)sum[m][q]);
}

// y [m, n] = x [m, k] W^T; weights: n / 64 panels of k / 2 x 64 x 2.
KERNEL static void multiply_pairs(const bf16 *x, const bf16 *weights, bf16 *y, int64_t m, int64_t n, int64_t k) {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < n / PANEL; panel++)
        for (int64_t i = 0; i < m; i += 4) { // a panel is read from memory once, then from the cache
            const bf16 *from = x + i * k, *w = weights + panel * PANEL * k;
            bf16 *to = y + i * n + panel * PANEL;
            switch (m - i) {
            case 1: bf16_panel(from, w, to, 1, n, k); break;
            case 2: bf16_panel(from, w, to, 2, n, k); break;
            case 3: bf16_panel(from, w, to, 3, n, k); break;
            default: bf16_panel(from, w, to, 4, n, k);
            }
        }
}

INLINE void int8_panel(const uint8_t *x, const float *x_scales, const int8_t *weights, const float *scales, const int32_t *shifts, bf16 *y,
                       int rows, int64_t n, int64_t k) {
    __m512i sum[4][4];
    panel_sums(x, (const uint8_t *)weights, rows, k / 4, 1, sum);
    for (int q = 0; q < 4; q++) {
        __m512 scale = _mm512_loadu_ps(scales + 16 * q);
        __m512i shift = _mm512_loadu_si512(shifts + 16 * q);
        for (int m = 0; m < rows; m++) {
            __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[m][q], shift));
            store16(y + m * n + 16 * q, _mm512_mul_ps(total, _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[m]))));
        }
    }
}

// The same with int8 weights, n / 64 panels of k / 4 x 64 x 4, and x rounded by round_row: x - 128 is what it means, so
// shifts [n] = 128 times the sum of a row of weights.
KERNEL static void multiply_rounded(const uint8_t *x, const float *x_scales, const int8_t *weights, const float *scales,
                                    const int32_t *shifts, bf16 *y, int64_t m, int64_t n, int64_t k) {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < n / PANEL; panel++)
        for (int64_t i = 0; i < m; i += 4) {
            const uint8_t *from = x + i * k;
            const int8_t *w = weights + panel * PANEL * k;
            const float *s = scales + panel * PANEL;
            const int32_t *shift = shifts + panel * PANEL;
            bf16 *to = y + i * n + panel * PANEL;
            switch (m - i) {
            case 1: int8_panel(from, x_scales + i, w, s, shift, to, 1, n, k); break;
            case 2: int8_panel(from, x_scales + i, w, s, shift, to, 2, n, k); break;
            case 3: int8_panel(from, x_scales + i, w, s, shift, to, 3, n, k); break;
            default: int8_panel(from, x_scales + i, w, s, shift, to, 4, n, k);
            }
        }
}

// ---- 8-bit weights as they are stored ----

// One row of weights times `rows` vectors x [rows, k] in float32.
INLINE void int8_row(const float *x, const int8_t *codes, float scale, bf16 *y, int rows, int64_t n, int64_t k) {
    __m512 sum[8][2];
    for (int m = 0; m < rows; m++) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 32) {
        _mm_prefetch((const char *)codes + i + AHEAD, _MM_HINT_T0);
        __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + i))));
        __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + i + 16))));
        for (int m = 0; m < rows; m++) {
            sum[m][0] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x + m * k + i), sum[m][0]);
            sum[m][1] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x + m * k + i + 16), sum[m][1]);
        }
    }
    for (int m = 0; m < rows; m++) {
        float total = _mm512_reduce_add_ps(_mm512_add_ps(sum[m][0], sum[m][1])) * scale;
        bf16 narrow[16];
        store16(narrow, _mm512_set1_ps(total));
        y[m * n] = narrow[0];
    }
}

// y [m, n] = x [m, k] W^T for 1 .. 8 rows of float32; codes [n, k], k a multiple of 32; scales [n].
KERNEL static void multiply_whole(const float *x, const int8_t *codes, const float *scales, bf16 *y, int64_t m, int64_t n, int64_t k) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n; row++)
        switch (m) {
        case 1: int8_row(x, codes + row * k, scales[row], y + row, 1, n, k); break;
        case 2: int8_row(x, codes + row * k, scales[row], y + row, 2, n, k); break;
        case 4: int8_row(x, codes + row * k, scales[row], y + row, 4, n, k); break;
        case 8: int8_row(x, codes + row * k, scales[row], y + row, 8, n, k); break;
        default:
            for (int64_t i = 0; i < m; i++) int8_row(x + i * k, codes + row * k, scales[row], y + i * n + row, 1, n, k);
        }
}

// ---- 4-bit weights times many vectors, by AMX ----
// Two tiles of 16 weight rows at a time become bf16 in the order in which AMX wants its second factor: the pairs of a group
// of 32 weights, 16 rows side by side, which is how they lie already.  x is copied into squares of 16 x 32 first.

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")))
#define SQUARE 512 // bf16 in a tile register: 16 x 32

// Whether this CPU has AMX and the system lets this process use it.
int minillm_runs_amx(void) {
    uint32_t a, b, c, d;
    if (!minillm_runs() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const int has = (d >> 22 & 1) && (d >> 24 & 1); // AMX-BF16, AMX-TILE
    return has && syscall(SYS_arch_prctl, 0x1023, 18) == 0; // ARCH_REQ_XCOMP_PERM for the tile registers
}

AMX static void tiles_ready(void) {
    static const struct { // palette 1, eight tiles of 16 rows of 64 bytes; a constant, so that no compiler drops a store
        uint8_t palette, start, reserved[14];
        uint16_t width[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
}

AMX static void tiles_released(void) { _tile_release(); }

// 32 weight rows b (two tiles of k / 32 squares) times x (in squares), into columns 0 .. 31 of y [m, n].
AMX static void multiply_squares(const bf16 *x, const bf16 *b, bf16 *y, int64_t m, int64_t n, int64_t k) {
    const int64_t groups = k / GROUP;
    float sums[4][16 * 16] __attribute__((aligned(64)));
    for (int64_t first = 0; first < m; first += 32) {
        const bf16 *upper = x + first / 16 * groups * SQUARE, *lower = upper + groups * SQUARE;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t g = 0; g < groups; g++) {
            _tile_loadd(4, upper + g * SQUARE, 64);
            _tile_loadd(5, lower + g * SQUARE, 64);
            _tile_loadd(6, b + g * SQUARE, 64);
            _tile_loadd(7, b + (groups + g) * SQUARE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int64_t r = 0; r < 32 && first + r < m; r++)
            for (int side = 0; side < 2; side++)
                store16(y + (first + r) * n + side * 16, _mm512_load_ps(sums[r / 16 * 2 + side] + r % 16 * 16));
    }
}

// y [m, n] = x [m, k] W^T, n a multiple of 32.  squares: scratch for x, m rounded up to 32, times k; weights: scratch, for
// every thread 32 x k.
KERNEL void minillm_int4_many(const bf16 *x, const uint8_t *codes, const bf16 *scales, bf16 *y, bf16 *squares, bf16 *weights, int64_t m,
                              int64_t n, int64_t k) {
    const int64_t groups = k / GROUP, padded = (m + 31) / 32 * 32;
#pragma omp parallel
    {
        bf16 *mine = weights + omp_get_thread_num() * 32 * k;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < padded; row++)
            for (int64_t g = 0; g < groups; g++)
                _mm512_storeu_si512(squares + (row / 16 * groups + g) * SQUARE + row % 16 * 32,
                                    row < m ? _mm512_loadu_si512(x + row * k + g * GROUP) : _mm512_setzero_si512());
        tiles_ready();
#pragma omp for schedule(static)
        for (int64_t two = 0; two < n / 32; two++) {
            for (int64_t side = 0; side < 2; side++)
                int4_pairs(codes + (two * 2 + side) * TILE * k / 2, scales + (two * 2 + side) * TILE * groups, mine + side * groups * SQUARE, k, 32);
            multiply_squares(squares, mine, y + two * 32, m, n, k);
        }
        tiles_released();
    }
}

// ---- attention of one token per row over slots ----

#define BLOCK 256 // slots that a thread takes at a time: the cut does not depend on the number of threads
#define MOST_GROUP 8
#define MOST_DIM 256 // of a head, for AMX
#define NOTHING (-INFINITY)

// What one token sees: positions oldest .. now, and the sinks, positions 0 .. sinks - 1, from any distance.
typedef struct {
    int32_t now, oldest, sinks;
} View;

// Which of the next 16 slots it sees; `left` of them are there.
INLINE __mmask16 seen_slots(const int32_t *positions, int64_t left, View view) {
    __mmask16 there = left >= 16 ? 0xFFFF : (1u << left) - 1;
    __m512i at = _mm512_maskz_loadu_epi32(there, positions);
    __mmask16 near = _mm512_mask_cmpge_epi32_mask(there, at, _mm512_set1_epi32(view.oldest));
    __mmask16 sink = _mm512_mask_cmplt_epi32_mask(there, at, _mm512_set1_epi32(view.sinks));
    __mmask16 seen = _mm512_mask_cmple_epi32_mask(near | sink, at, _mm512_set1_epi32(view.now));
    return _mm512_mask_cmpge_epi32_mask(seen, at, _mm512_setzero_si512()); // -1: nothing there
}

// Scores -> e^(score - most), 0 for what is not seen; notes[0] = most, notes[1] = their sum.
INLINE void softmax_block(float *weights, int64_t slots, float most, float *notes) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t s = 0; s < slots; s += 16) {
        __m512 score = _mm512_load_ps(weights + s);
        __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(NOTHING), _CMP_NEQ_OQ);
        __m512 weight = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(score, _mm512_set1_ps(most))));
        _mm512_store_ps(weights + s, weight);
        total = _mm512_add_ps(total, weight);
    }
    notes[0] = most;
    notes[1] = _mm512_reduce_add_ps(total);
}

// Up to 8 queries that share a KV head against one block of its slots: their largest score, the sum of e^(score - largest),
// and the sum of the values weighted so.  far: queries for the first `asked` slots of the block instead of q, or NULL.
INLINE void attend_block(const bf16 *q, const bf16 *far, int64_t asked, int64_t heads, const bf16 *keys, const bf16 *values,
                         const int32_t *positions, int64_t slots, int64_t dim, View view, float *part) {
    float weights[MOST_GROUP][BLOCK] __attribute__((aligned(64)));
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)dim));
    const int64_t stride = dim + 2;
    __m512 largest[MOST_GROUP];
    for (int g = 0; g < heads; g++) largest[g] = _mm512_set1_ps(NOTHING);
    for (int64_t s = 0; s < slots; s += 16) {
        __mmask16 seen = seen_slots(positions + s, slots - s, view);
        for (int64_t i = 0; i < 16 * dim; i += 32) { // the keys after the next ones, and the values, which have their turn later
            _mm_prefetch((const char *)(keys + (s + 32) * dim + i), _MM_HINT_T0);
            _mm_prefetch((const char *)(values + s * dim + i), _MM_HINT_T0);
        }
        for (int g = 0; g < heads; g++) {
            __m512 products[16];
            for (int i = 0; i < 16; i++) {
                const bf16 *key = keys + (s + i < slots ? s + i : slots - 1) * dim;
                const bf16 *query = (s + i < asked ? far : q) + g * dim;
                __m512 sum = _mm512_setzero_ps();
                for (int64_t d = 0; d < dim; d += 32) sum = _mm512_dpbf16_ps(sum, load32(query + d), load32(key + d));
                products[i] = sum;
            }
            __m512 score = _mm512_mask_mul_ps(_mm512_set1_ps(NOTHING), seen, sums(products), scale);
            _mm512_store_ps(&weights[g][s], score);
            largest[g] = _mm512_max_ps(largest[g], score);
        }
    }
    for (int g = 0; g < heads; g++) softmax_block(weights[g], slots, _mm512_reduce_max_ps(largest[g]), part + g * stride + dim);
    for (int64_t d = 0; d < dim; d += 32) {
        __m512 low[MOST_GROUP], high[MOST_GROUP];
        for (int g = 0; g < heads; g++) low[g] = high[g] = _mm512_setzero_ps();
        for (int64_t s = 0; s < slots; s++) {
            __m512 a = load16(values + s * dim + d), b = load16(values + s * dim + d + 16);
            for (int g = 0; g < heads; g++) {
                __m512 weight = _mm512_set1_ps(weights[g][s]);
                low[g] = _mm512_fmadd_ps(weight, a, low[g]);
                high[g] = _mm512_fmadd_ps(weight, b, high[g]);
            }
        }
        for (int g = 0; g < heads; g++) {
            _mm512_storeu_ps(part + g * stride + d, low[g]);
            _mm512_storeu_ps(part + g * stride + d + 16, high[g]);
        }
    }
}

// The bf16 numbers first, first + 16 + ... of two vectors in turn: a0 b0 a1 b1 ...
INLINE __m512i alternate(int first) {
    __m512i lane = _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(first));
    return _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
}

// Queries [heads, dim] as dim / 32 squares: the pairs of 32 dimensions, one column for each query.
INLINE void queries_as_squares(const bf16 *q, int64_t heads, int64_t dim, bf16 (*squares)[SQUARE]) {
    memset(squares, 0, dim / 32 * SQUARE * sizeof(bf16));
    for (int64_t g = 0; g < heads; g++)
        for (int64_t p = 0; p < dim / 2; p++) memcpy(&squares[p / 16][p % 16 * 32 + 2 * g], q + g * dim + 2 * p, 4);
}

// Products of 16 keys with up to 16 queries in squares: out [16 keys, 16 queries].
AMX static void multiply_keys(const bf16 *keys, const bf16 (*squares)[SQUARE], int64_t dim, float *out) {
    _tile_zero(0);
    for (int64_t c = 0; c < dim / 32; c++) {
        _tile_loadd(1, keys + 32 * c, dim * sizeof(bf16));
        _tile_loadd(2, squares[c], 64);
        _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, out, 64);
}

// The same by AMX: 16 slots against up to 16 queries at a time.  Weights are rounded to bf16 before they meet the values.
AMX static void attend_block_amx(const bf16 *q, const bf16 *far, int64_t asked, int64_t heads, const bf16 *keys, const bf16 *values,
                                 const int32_t *positions, int64_t slots, int64_t dim, View view, float *part) {
    bf16 near[MOST_DIM / 32][SQUARE] __attribute__((aligned(64))), distant[MOST_DIM / 32][SQUARE] __attribute__((aligned(64)));
    bf16 rounded[16][BLOCK] __attribute__((aligned(64))), pairs[4][SQUARE] __attribute__((aligned(64)));
    float weights[MOST_GROUP][BLOCK] __attribute__((aligned(64))), square[16 * 16] __attribute__((aligned(64)));
    bf16 last[16 * MOST_DIM] __attribute__((aligned(64)));
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf((float)dim));
    const int64_t stride = dim + 2;
    __m512 largest[MOST_GROUP];
    tiles_ready();
    queries_as_squares(q, heads, dim, near);
    if (asked) queries_as_squares(far, heads, dim, distant);
    for (int g = 0; g < heads; g++) largest[g] = _mm512_set1_ps(NOTHING);
    for (int64_t s = 0; s < slots; s += 16) {
        const bf16 *key = keys + s * dim;
        if (slots - s < 16) { // what lies behind the last slot is not ours to read
            memset(last, 0, sizeof(last));
            key = memcpy(last, key, (slots - s) * dim * sizeof(bf16));
        }
        __m512i products[16], by_head[16];
        multiply_keys(key, near, dim, square);
        for (int r = 0; r < 16; r++) products[r] = _mm512_load_si512(square + 16 * r);
        if (s < asked) {
            multiply_keys(key, distant, dim, square);
            for (int r = 0; r < 16 && s + r < asked; r++) products[r] = _mm512_load_si512(square + 16 * r);
        }
        transpose16(products, by_head);
        __mmask16 seen = seen_slots(positions + s, slots - s, view);
        for (int64_t i = 0; i < 16 * dim; i += 32) {
            _mm_prefetch((const char *)(keys + (s + 64) * dim + i), _MM_HINT_T0);
            _mm_prefetch((const char *)(values + s * dim + i), _MM_HINT_T0);
        }
        for (int g = 0; g < heads; g++) {
            __m512 score = _mm512_mask_mul_ps(_mm512_set1_ps(NOTHING), seen, _mm512_castsi512_ps(by_head[g]), scale);
            _mm512_store_ps(&weights[g][s], score);
            largest[g] = _mm512_max_ps(largest[g], score);
        }
    }
    memset(rounded, 0, sizeof(rounded));
    for (int g = 0; g < heads; g++) {
        softmax_block(weights[g], slots, _mm512_reduce_max_ps(largest[g]), part + g * stride + dim);
        for (int64_t s = 0; s < slots; s += 16) store16(&rounded[g][s], _mm512_load_ps(&weights[g][s]));
    }
    for (int64_t d = 0; d < dim; d += 64) {
        const int64_t tiles = dim - d < 64 ? 2 : 4;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t s = 0; s < slots; s += 32) {
            for (int r = 0; r < 16; r++) // values of two slots side by side
                for (int64_t c = 0; c < tiles / 2; c++) {
                    const bf16 *value = values + (s + 2 * r) * dim + d + 32 * c;
                    __m512i a = s + 2 * r < slots ? _mm512_loadu_si512(value) : _mm512_setzero_si512();
                    __m512i b = s + 2 * r + 1 < slots ? _mm512_loadu_si512(value + dim) : _mm512_setzero_si512();
                    _mm512_store_si512(&pairs[2 * c][32 * r], _mm512_permutex2var_epi16(a, alternate(0), b));
                    _mm512_store_si512(&pairs[2 * c + 1][32 * r], _mm512_permutex2var_epi16(a, alternate(16), b));
                }
            _tile_loadd(4, &rounded[0][s], BLOCK * sizeof(bf16));
            _tile_loadd(5, pairs[0], 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, pairs[1], 64);
            _tile_dpbf16ps(1, 4, 6);
            if (tiles == 2) continue;
            _tile_loadd(5, pairs[2], 64);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(6, pairs[3], 64);
            _tile_dpbf16ps(3, 4, 6);
        }
        for (int64_t t = 0; t < tiles; t++) {
            switch (t) {
            case 0: _tile_stored(0, square, 64); break;
            case 1: _tile_stored(1, square, 64); break;
            case 2: _tile_stored(2, square, 64); break;
            default: _tile_stored(3, square, 64);
            }
            for (int g = 0; g < heads; g++) _mm512_storeu_ps(part + g * stride + d + 16 * t, _mm512_load_ps(square + 16 * g));
        }
    }
    tiles_released();
}

KERNEL static void attend_heads(const bf16 *q, const bf16 *far, int64_t asked, int64_t heads, const bf16 *keys, const bf16 *values,
                                const int32_t *positions, int64_t slots, int64_t dim, View view, float *part, int64_t amx) {
    if (amx && dim <= MOST_DIM) return attend_block_amx(q, far, asked, heads, keys, values, positions, slots, dim, view, part);
#define CASE(G, D)                                                                                                                       \
    if (heads == G && dim == D) return attend_block(q, far, asked, G, keys, values, positions, slots, D, view, part);
    CASE(8, 64) CASE(4, 64) CASE(3, 64) CASE(1, 64) CASE(8, 128) CASE(4, 128) CASE(2, 128) CASE(1, 128) // constants: in registers
#undef CASE
    for (int64_t g = 0; g < heads; g++) // any other shape, one query head at a time
        attend_block(q + g * dim, far ? far + g * dim : far, asked, 1, keys, values, positions, slots, dim, view, part + g * (dim + 2));
}

// The slots of a layer, and where in its life it is: slots.py.  Rows are at positions now[row], or -1: those take no part.
// The first `reach` slots may hold something.  Seen are positions > now - window, and from any distance those of `sinks`.
typedef struct {
    bf16 *keys, *values; // [rows, kv_heads, slots, dim]
    int32_t *positions; // [rows, kv_heads, slots]
    const int64_t *free; // [rows, kv_heads, every]: the slots that the last eviction freed
    const int64_t *now;
    int64_t window, sinks, rows, kv_heads, slots, every, reach, dim;
    int64_t heads; // of queries
    int64_t amx;
    const int64_t *which; // [rows] of the cache that take part; or NULL: all of them
    const bf16 *cos, *sin; // [rows, dim] for tokens at `now`
    const bf16 *far_cos, *far_sin; // what turns the queries for sinks; or NULL
} Slots;

static int64_t row_of(const Slots *c, int64_t row) { return c->which ? c->which[row] : row; }

// How many slots of a row may hold something: rows that were chosen each have a reach of their own.
static int64_t reach_of(const Slots *c, int64_t row) { return c->which && c->now[row] < c->reach ? c->now[row] + 1 : c->reach; }

static int64_t parts_of(const Slots *c) { return c->rows * c->heads * ((c->reach + BLOCK - 1) / BLOCK) * (c->dim + 2); }

// out [rows, heads, dim] of queries q [rows, heads, dim] (rows q_stride apart); the slots of the sinks are asked with `far`
// where that is given.  parts: scratch, parts_of(c).
KERNEL static void attend(const Slots *c, const bf16 *q, int64_t q_stride, const bf16 *far, int64_t far_stride, bf16 *out, float *parts) {
    const int64_t heads = c->heads, kv_heads = c->kv_heads, dim = c->dim, window = c->window, sinks = c->sinks;
    const int64_t group = heads / kv_heads, cuts = (c->reach + BLOCK - 1) / BLOCK, stride = dim + 2;
    const int64_t pieces = (group + MOST_GROUP - 1) / MOST_GROUP; // groups of more than 8 query heads are taken apart
    const int64_t tasks = c->rows * kv_heads * pieces * cuts;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t cut = task % cuts, piece = task / cuts % pieces, kv = task / cuts / pieces, row = kv / kv_heads;
        int64_t first = cut * BLOCK, left = reach_of(c, row) - first, many = left < BLOCK ? left : BLOCK;
        if (left <= 0) continue;
        int64_t head = piece * MOST_GROUP, count = group - head < MOST_GROUP ? group - head : MOST_GROUP;
        int64_t query = (kv % kv_heads) * group + head, now = c->now[row];
        int64_t at = (row_of(c, row) * kv_heads + kv % kv_heads) * c->slots + first;
        View view = {(int32_t)now, (int32_t)(now - window + 1 > 0 ? now - window + 1 : 0), (int32_t)sinks};
        const bf16 *from_far = far ? far + row * far_stride + query * dim : far;
        // the parts of one cut lie together: [rows, kv_heads, pieces, cuts] x up to 8 heads
        float *part = parts + ((kv * group + head) * cuts + cut * count) * stride;
        int64_t asked = far && sinks > first ? sinks - first : 0;
        attend_heads(q + row * q_stride + query * dim, from_far, asked, count, c->keys + at * dim, c->values + at * dim, c->positions + at,
                     many, dim, view, part, c->amx);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < c->rows * heads; item++) {
        int64_t kv = item / group, g = item % group, head = g / MOST_GROUP * MOST_GROUP;
        int64_t count = group - head < MOST_GROUP ? group - head : MOST_GROUP;
        const float *mine = parts + ((kv * group + head) * cuts + g - head) * stride;
        const int64_t used = (reach_of(c, kv / kv_heads) + BLOCK - 1) / BLOCK;
        float most = NOTHING, total = 0;
        for (int64_t cut = 0; cut < used; cut++) most = fmaxf(most, mine[cut * count * stride + dim]);
        if (most == NOTHING) { // sees nothing
            memset(out + item * dim, 0, dim * sizeof(bf16));
            continue;
        }
        for (int64_t cut = 0; cut < used; cut++) total += expf(mine[cut * count * stride + dim] - most) * mine[cut * count * stride + dim + 1];
        for (int64_t d = 0; d < dim; d += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t cut = 0; cut < used; cut++) {
                const float *part = mine + cut * count * stride;
                sum = _mm512_fmadd_ps(_mm512_set1_ps(expf(part[dim] - most) / total), _mm512_loadu_ps(part + d), sum);
            }
            store16(out + item * dim + d, sum);
        }
    }
}

KERNEL void minillm_attend(const Slots *c, const bf16 *q, int64_t q_stride, const bf16 *far, int64_t far_stride, bf16 *out, float *parts) {
#pragma omp parallel
    attend(c, q, q_stride, far, far_stride, out, parts);
}

// ---- one token per row, from its projections to what it attends to ----

INLINE void rotate_head(const bf16 *head, const bf16 *cos, const bf16 *sin, bf16 *out, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < dim; i += 16) {
        __m512 turned = _mm512_mul_ps(load16(head + (i < half ? i + half : i - half)), load16(sin + i));
        store16(out + i, _mm512_fmadd_ps(load16(head + i), load16(cos + i), turned));
    }
}

// qkv [rows, heads + 2 kv_heads, dim] of the tokens at `now`: turns queries and keys, writes key, value and position into
// the slot where they belong - the position itself while there are slots, then those that the last eviction freed - and
// attends: out [rows, heads, dim].  queries: scratch, 2 x rows x heads x dim.
KERNEL static void step(const Slots *c, const bf16 *qkv, bf16 *queries, bf16 *out, float *parts) {
    const int64_t heads = c->heads, kv_heads = c->kv_heads, dim = c->dim, every = c->every;
    bf16 *far = c->far_cos ? queries + c->rows * heads * dim : NULL;
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < c->rows; row++)
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            const bf16 *head = qkv + (row * (heads + 2 * kv_heads) + h) * dim, *cos = c->cos + row * dim, *sin = c->sin + row * dim;
            if (h < heads) {
                rotate_head(head, cos, sin, queries + (row * heads + h) * dim, dim);
                if (far) rotate_head(head, c->far_cos + row * dim, c->far_sin + row * dim, far + (row * heads + h) * dim, dim);
                continue;
            }
            int64_t kv = row_of(c, row) * kv_heads + h - heads, now = c->now[row];
            if (now < 0) continue;
            int64_t at = kv * c->slots + (now < c->slots ? now : c->free[kv * every + (now - c->slots) % every]);
            rotate_head(head, cos, sin, c->keys + at * dim, dim);
            memcpy(c->values + at * dim, head + kv_heads * dim, dim * sizeof(bf16));
            c->positions[at] = (int32_t)now;
        }
    attend(c, queries, heads * dim, far, heads * dim, out, parts);
}

KERNEL void minillm_step(const Slots *c, const bf16 *qkv, bf16 *queries, bf16 *out, float *parts) {
#pragma omp parallel
    step(c, qkv, queries, out, parts);
}

// ---- around the linear layers ----

// row [size] += delta (where there is one); y = row / sqrt(mean(row^2) + eps) * weight.
INLINE void norm_row(bf16 *row, const bf16 *delta, const bf16 *weight, bf16 *y, int64_t size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        __m512 value = load16(row + i);
        if (delta) {
            store16(row + i, _mm512_add_ps(value, load16(delta + i)));
            value = load16(row + i); // as rounded, so that it is what the next reader sees
        }
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + eps));
    for (int64_t i = 0; i < size; i += 16) store16(y + i, _mm512_mul_ps(_mm512_mul_ps(load16(row + i), factor), load16(weight + i)));
}

KERNEL void minillm_rms_norm(bf16 *x, const bf16 *delta, const bf16 *weight, bf16 *y, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t r = 0; r < rows; r++) norm_row(x + r * size, delta ? delta + r * size : delta, weight, y + r * size, size, eps);
}

// y [16] = silu(gate) * up.
INLINE void gate16(const bf16 *gates, const bf16 *ups, bf16 *y) {
    __m512 gate = load16(gates), e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(gate))); // never overflows
    __m512 one = _mm512_set1_ps(1.0f), above = _mm512_div_ps(one, _mm512_add_ps(one, e));
    __mmask16 negative = _mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_LT_OQ);
    __m512 sigmoid = _mm512_mask_mul_ps(above, negative, above, e);
    store16(y, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid), load16(ups)));
}

// y [rows, size] = silu(gate) * up, of x [rows, 2 size]: gate, then up.
KERNEL static void gated(const bf16 *x, bf16 *y, int64_t rows, int64_t size) {
#pragma omp for collapse(2) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < size; i += 16) gate16(x + 2 * r * size + i, x + (2 * r + 1) * size + i, y + r * size + i);
}

KERNEL void minillm_gated(const bf16 *x, bf16 *y, int64_t rows, int64_t size) {
#pragma omp parallel if (rows > 8)
    gated(x, y, rows, size);
}

// Turns the pairs (x[i], x[i + dim / 2]) of `heads` heads of x [tokens, stride]: y [tokens, heads, dim] = x cos + roll(x) sin.
KERNEL void minillm_rotate(const bf16 *x, int64_t stride, const bf16 *cos, const bf16 *sin, bf16 *y, int64_t tokens, int64_t heads, int64_t dim) {
#pragma omp parallel for schedule(static) if (tokens > 8)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++)
            rotate_head(x + t * stride + h * dim, cos + t * dim, sin + t * dim, y + (t * heads + h) * dim, dim);
}

// codes [size] = row / scale, rounded, + 128; the scale is the largest |x| of the row / 127.
INLINE float round_row(const bf16 *row, uint8_t *codes, int64_t size) {
    __m512 largest = _mm512_set1_ps(1e-30f);
    for (int64_t i = 0; i < size; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(load16(row + i)));
    float scale = _mm512_reduce_max_ps(largest) / 127.0f;
    __m512 steps = _mm512_set1_ps(1.0f / scale);
    for (int64_t i = 0; i < size; i += 16) {
        __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(load16(row + i), steps)), _mm512_set1_epi32(128));
        _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8(code));
    }
    return scale;
}

KERNEL void minillm_round(const bf16 *x, uint8_t *codes, float *scales, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t r = 0; r < rows; r++) scales[r] = round_row(x + r * size, codes + r * size, size);
}

// ---- linear layers of few tokens, and a whole layer of one token per row ----
// A step is some ten thousand microseconds in some two hundred pieces: what lies between the pieces counts.  So a layer is
// one team of threads from end to end, and the functions above that have no `parallel` of their own share its work.

enum { PAIRS, ROUNDED, WHOLE, NIBBLES };

typedef struct {
    int64_t form, n, k;
    const void *weights, *scales; // as multiply_pairs and its sisters want them
    const int32_t *shifts; // ROUNDED
    const bf16 *bias; // [n], or NULL
} Linear;

static int64_t linear_scratch(const Linear *l, int64_t m) {
    return l->form == ROUNDED ? m * (l->k + (int64_t)sizeof(float)) : l->form == WHOLE ? m * l->k * (int64_t)sizeof(float) : 0;
}

// y [m, n] = x [m, k] W^T + bias for 1 .. 8 rows.  scratch: linear_scratch bytes.
KERNEL static void multiply(const Linear *l, const bf16 *x, bf16 *y, int64_t m, void *scratch) {
    const int64_t n = l->n, k = l->k;
    float *numbers = scratch;
    uint8_t *codes = (uint8_t *)(numbers + m);
    switch (l->form) {
    case PAIRS: multiply_pairs(x, l->weights, y, m, n, k); break;
    case NIBBLES: multiply_nibbles(x, l->weights, l->scales, y, m, n, k); break;
    case ROUNDED:
#pragma omp for schedule(static)
        for (int64_t r = 0; r < m; r++) numbers[r] = round_row(x + r * k, codes + r * k, k);
        multiply_rounded(codes, numbers, l->weights, l->scales, l->shifts, y, m, n, k);
        break;
    default:
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m * k; i += 16) _mm512_storeu_ps(numbers + i, load16(x + i));
        multiply_whole(numbers, l->weights, l->scales, y, m, n, k);
    }
    if (!l->bias) return;
#pragma omp for collapse(2) schedule(static)
    for (int64_t r = 0; r < m; r++)
        for (int64_t i = 0; i < n; i++) {
            bf16 sum[16];
            store16(sum, _mm512_set1_ps(of_bf16(y[r * n + i]) + of_bf16(l->bias[i])));
            y[r * n + i] = sum[0];
        }
}

KERNEL void minillm_linear(const Linear *l, const bf16 *x, bf16 *y, int64_t m) {
    uint8_t *scratch = malloc(linear_scratch(l, m) + 1); // kilobytes: where they are missing, nothing else would go on
#pragma omp parallel
    multiply(l, x, y, m, scratch);
    free(scratch);
}

typedef struct {
    Linear qkv, o, gate_up, down;
    const bf16 *norm, *post; // weights of the norms before attention and before the feed-forward
    float norm_eps, post_eps;
} Layer;

// Where a layer keeps what it computes on its way, each behind the other in `scratch`.
typedef struct {
    bf16 *normed, *wide, *queries, *attended, *delta, *gated;
    float *parts;
    void *rounded;
    int64_t bytes;
} Room;

static void *take(uint8_t *scratch, int64_t *bytes, int64_t count, int64_t size) {
    void *at = scratch + *bytes;
    *bytes += (count * size + 63) / 64 * 64;
    return at;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static Room rooms(const Layer *layer, const Slots *c, uint8_t *scratch) {
    const int64_t rows = c->rows, hidden = layer->o.n, of_queries = rows * c->heads * c->dim, size = sizeof(bf16);
    const Linear *all[] = {&layer->qkv, &layer->o, &layer->gate_up, &layer->down};
    int64_t rounded = 0;
    for (int i = 0; i < 4; i++) rounded = larger(rounded, linear_scratch(all[i], rows));
    Room room = {.bytes = 0};
    room.normed = take(scratch, &room.bytes, rows * hidden, size);
    room.wide = take(scratch, &room.bytes, rows * larger(layer->qkv.n, layer->gate_up.n), size);
    room.queries = take(scratch, &room.bytes, 2 * of_queries, size);
    room.attended = take(scratch, &room.bytes, of_queries, size);
    room.delta = take(scratch, &room.bytes, rows * hidden, size);
    room.gated = take(scratch, &room.bytes, rows * layer->down.k, size);
    room.parts = take(scratch, &room.bytes, parts_of(c), sizeof(float));
    room.rounded = take(scratch, &room.bytes, rounded, 1);
    return room;
}

// x [rows, hidden] of the tokens at `now`, through a layer: fused.py.
KERNEL void minillm_layer(const Layer *layer, const Slots *c, bf16 *x) {
    const int64_t rows = c->rows, hidden = layer->o.n, middle = layer->down.k;
    uint8_t *scratch = malloc(rooms(layer, c, NULL).bytes);
    const Room room = rooms(layer, c, scratch);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) norm_row(x + r * hidden, NULL, layer->norm, room.normed + r * hidden, hidden, layer->norm_eps);
        multiply(&layer->qkv, room.normed, room.wide, rows, room.rounded);
        step(c, room.wide, room.queries, room.attended, room.parts);
        multiply(&layer->o, room.attended, room.delta, rows, room.rounded);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            norm_row(x + r * hidden, room.delta + r * hidden, layer->post, room.normed + r * hidden, hidden, layer->post_eps);
        multiply(&layer->gate_up, room.normed, room.wide, rows, room.rounded);
        gated(room.wide, room.gated, rows, middle);
        multiply(&layer->down, room.gated, room.delta, rows, room.rounded);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * hidden; i += 16) store16(x + i, _mm512_add_ps(load16(x + i), load16(room.delta + i)));
    }
    free(scratch);
}
