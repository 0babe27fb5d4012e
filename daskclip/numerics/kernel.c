/* Exact norms of the slices of an array, the factors that bring them to a limit, and rescaling.

   Plain C11 without libc, libm or Python. Compile with -fwrapv (integer sums wrap), without
   contraction or fast-math (every addition rounds where it is written) and with -fno-strict-aliasing
   (elements are read as their bits). The caller provides a `block`; see `Block` in compiled.py.

   A sum is a number of 32-bit limbs for each slice, limb i weighing 2**(32 * (FIRST + i)), kept in
   int64: parts of either sign are added without carrying, up to 2**31 of them, and carried once at
   the end. So the sum is exact, whatever the order, the grouping and the layout of the elements. */

#include <stdint.h>

#define API __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)") /* x and out: apart, or the same */
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

typedef int32_t i32;
typedef int64_t i64;
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef unsigned __int128 u128;
typedef i32 bits_float; /* integers of the size of the elements, and bins of their squares */
typedef i64 bits_double;
typedef u64 bin_float;
typedef u128 bin_double;

enum {
    AXES = 72,    /* NumPy has 64 at most, and one more for the parts of complex elements */
    RUN = 4096,   /* elements of a row that are added at a time: 2**12 */
    LANES = 1024, /* lanes side by side, and slices of a box */
    ROWS = 64,    /* rows of lanes that are added at a time */
    MANY = 256,   /* elements of a run from which bins pay */
    SHORT = 8,    /* elements side by side below which they are lanes, not rows */
    CACHE = 1 << 17, /* bytes of rows that are summed and rescaled while they are at hand */
};
enum { NAN_MET = 1, INF_MET = 2 };
enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };
static const i64 SIZE[] = {2, 2, 4, 8}, FIRST[] = {-11, -11, -11, -69}, LIMBS[] = {24, 24, 24, 138};

#define GRID0 0x1.8p2   /* 1.5 * 2**(52 - 50) */
#define GRID1 0x1.8p-48
#define GRID2 0x1.8p-98
#define GRID3 0x1.8p-148
#define QUIET 0x7FF8000000000000 /* the NaN that the operation makes */

/* A sum by its highest 128 bits: (high * 2**64 + low + more) * 2**exponent, where high has its top bit
   set and more stands for what lies below. */
typedef struct {
    u64 high, low;
    i64 more, exponent;
} leading;

/* Memory of a call: zeros at first. */
typedef struct {
    u128 bins[2048];
    i64 count;   /* of elements in the bins */
    i64 used[2]; /* limbs in use: the first, and one past the last */
    i64 zero;    /* place of the bit that weighs 1 */
    u64 top[LANES], low[LANES];
    i64 s[4][LANES];
    u8 flags[LANES]; /* of slices; then what is made of their sums: the root is (root + rest) * 2**half, */
    leading sum[LANES]; /* the limit mantissa * 2**power, and their quotient, lowered, factor */
    double upper[LANES], lower[LANES], root[LANES], rest[LANES], mantissa[LANES], factor[LANES];
    i64 half[LANES], power[LANES];
    double scale[RUN], unit[RUN]; /* of lanes; then their factors, and what products are cut to, or 0 */
    i64 shift[RUN], cut, special;
    char in[8 * LANES * ROWS], out[8 * RUN], raw[8 * RUN]; /* elements as numbers, and as they are stored */
    i64 sums[]; /* limbs of at most LANES slices */
} work;

/* An array as axes in the order of memory, and what is known or wanted of its slices. */
typedef struct {
    i64 axes, length[AXES];
    i64 from[AXES], to[AXES]; /* bytes from an element of x, or of out, to the next along an axis */
    i64 slice[AXES];          /* the same in numbers of slices: 0 along reduced axes */
    i64 local[AXES], base;    /* the same among those of a box; number of its first slice */
    const char *x;
    char *out;
    i64 type, swapped;     /* swapped: not in the order of bytes of this machine */
    i64 omit, paired;      /* NaN does not count; complex elements do so as a whole */
    i64 power, largest;    /* of the magnitudes that are added up, or whose largest is taken */
    i64 alone;             /* one magnitude stands for a slice: its largest, or its only one */
    i64 keep, lowest;      /* mask of the bits of a product; exponent of the smallest subnormal */
    i64 slices, limbs_of_slice;
    const double *limit;   /* of each slice, or of all: then limits is 0, else 1 */
    i64 limits;
    double tiny;           /* the limit below which subnormal results are rounded toward zero */
    double *factor, *norm;
    i32 *shift;            /* power of two that is still to be applied to float64 */
    u8 *toward_zero, *flags;
    u32 *limbs;            /* by limb, then by slice */
    i64 used[2];           /* the first limb that is not zero everywhere, and one past the last */
    work *scratch;
} block;

static inline i64 bits_of(double d) { return (union { double d; i64 i; }){.d = d}.i; }
static inline double double_of(i64 i) { return (union { double d; i64 i; }){.i = i}.d; }
static inline u32 bits_of_float(float f) { return (union { float f; u32 i; }){.f = f}.i; }
static inline float float_of(u32 i) { return (union { float f; u32 i; }){.i = i}.f; }
static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* 2**e for e from -1074 to 1023. */
static inline double power_of_two(i64 e) {
    return double_of(e < -1022 ? (i64)1 << (e + 1074) : (e + 1023) << 52);
}

/* v * 2**e, rounded once. */
static double scaled(double v, i64 e) {
    for (; e > 1023; e -= 1023) v *= power_of_two(1023);
    while (e < -1022) { /* exact, unless the result is 0 all the same */
        i64 step = e < -2044 ? -1022 : e + 1022;
        v *= power_of_two(step), e -= step;
    }
    return v * power_of_two(e);
}

/* The mantissa of v, in [0.5, 1) or 0, and its exponent. */
static inline double split(double v, i64 *exponent) {
    i64 extra = __builtin_fabs(v) < 0x1p-1022 ? 64 : 0, bits = bits_of(extra ? v * 0x1p64 : v);
    *exponent = v == 0 ? 0 : (bits >> 52 & 0x7FF) - 1022 - extra;
    return v == 0 ? v : double_of((bits & ~((i64)0x7FF << 52)) | (i64)1022 << 52);
}

/* The error of the rounded product p of a and b (Dekker, Veltkamp): exact where nothing underflows. */
static inline double error_of(double a, double b, double p) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fma(a, b, -p);
#else
    double a1 = a * 134217729.0, b1 = b * 134217729.0; /* 2**27 + 1 */
    a1 -= a1 - a, b1 -= b1 - b;
    double a2 = a - a1, b2 = b - b1;
    return ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2;
#endif
}

/* Add part * 2**unit to the limbs of a slice. */
static inline void put(work *w, i64 *limbs, i64 unit, i64 part) {
    if (!part) return; /* its unit may lie below all limbs */
    unit += w->zero;
    i64 i = unit >> 5, shift = unit & 31, low = (part & 0xFFFFFFFF) << shift, high = (part >> 32) << shift;
    limbs[i] += low & 0xFFFFFFFF;
    limbs[i + 1] += (i64)((u64)low >> 32) + (high & 0xFFFFFFFF);
    limbs[i + 2] += high >> 32;
    w->used[0] = least(w->used[0], i), w->used[1] = w->used[1] > i + 3 ? w->used[1] : i + 3;
}

/* The sum m * 2**unit. */
static leading leading_of_integer(u128 m, i64 unit) {
    if (!m) return (leading){0, 0, 0, -(1 << 20)};
    i64 up = m >> 64 ? __builtin_clzll(m >> 64) : 64 + __builtin_clzll(m);
    m <<= up;
    return (leading){m >> 64, (u64)m, 0, unit - up};
}

#define T float
#include "runs.h"
#undef T
#define T double
#include "runs.h"
#define CALL(b, function, ...) \
    ((b)->type == FLOAT64 ? function##_double(__VA_ARGS__) : function##_float(__VA_ARGS__))

/* ---- elements in memory */

/* Bits of a float of the same value as a float16 or a bfloat16; NaN keeps its bits. */
static inline u32 widened(u16 h, i64 type) {
    u32 sign = (u32)(h & 0x8000) << 16, infinite = (h & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;
    if (type == BFLOAT16) return (u32)h << 16;
    return sign | infinite | bits_of_float(float_of((u32)(h & 0x7FFF) << 13) * 0x1p112f);
}

/* The inverse. Elements have the bits of the dtype, but for subnormals: those are rounded to even. */
static inline u16 narrowed(u32 v, i64 type) {
    u32 m = v & 0x7FFFFFFF, rounded = (v + 0x7FFF + (v >> 16 & 1)) >> 16;
    u32 subnormal = bits_of_float(float_of(m) + 0.5f) - 0x3F000000;
    if (type == BFLOAT16) return m > 0x7F800000 ? v >> 16 : rounded;
    u32 finite = m < 0x38800000 ? subnormal : (m - 0x38000000) >> 13;
    return (v >> 16 & 0x8000) | (m >= 0x7F800000 ? 0x7C00 | (m >> 13 & 0x3FF) : finite);
}

/* Move n elements between memory where they lie `step` bytes apart, maybe with their bytes swapped, and
   memory where they touch. */
static void gather(const block *b, char *to, i64 to_step, const char *from, i64 from_step, i64 n) {
    i64 size = SIZE[b->type], flip = b->swapped ? size - 1 : 0;
    for (i64 i = 0; i < n; i++)
        for (i64 k = 0; k < size; k++) to[i * to_step + k] = from[i * from_step + (k ^ flip)];
}

/* Whether elements are in memory as this machine has them. */
static inline int is_plain(const block *b, const char *p, i64 step) {
    i64 size = SIZE[b->type];
    return !b->swapped && step == size && !((uintptr_t)p & (size - 1));
}

/* Make native floats or doubles of n elements that lie `step` bytes apart. */
static const void *converted(const block *b, const char *p, i64 n, i64 step, char *to) {
    i64 type = b->type, size = SIZE[type], plain = is_plain(b, p, step);
    if (!plain) gather(b, size == 2 ? b->scratch->raw : to, size, p, step, n);
    if (size > 2) return to;
    const u16 *h = (const u16 *)(plain ? p : b->scratch->raw);
    u32 *t = (u32 *)to;
    for (i64 i = 0; i < n; i++) t[i] = widened(h[i], type);
    return to;
}

/* The same, where they are if that can be. */
static INLINE const void *load(const block *b, const char *p, i64 n, i64 step, char *to) {
    return SIZE[b->type] > 2 && is_plain(b, p, step) ? p : converted(b, p, n, step, to);
}

/* The inverse of `converted`. */
static void store(const block *b, char *from, char *p, i64 n, i64 step) {
    i64 type = b->type, size = SIZE[type], plain = is_plain(b, p, step);
    u16 *h = (u16 *)(plain ? p : b->scratch->raw);
    const u32 *f = (const u32 *)from;
    if (type == FLOAT16)
        for (i64 i = 0; i < n; i++) h[i] = narrowed(f[i], FLOAT16);
    if (type == BFLOAT16)
        for (i64 i = 0; i < n; i++) h[i] = narrowed(f[i], BFLOAT16);
    if (!plain) gather(b, p, step, size == 2 ? b->scratch->raw : from, size, n);
}

/* A place among some of the axes, as an odometer. */
typedef struct {
    i64 axes, axis[AXES], at[AXES];
    const char *x;
    char *out;
    i64 slice, local;
} place;

/* Go on to the next place, the last axis fastest; 0 after the last one. */
static int advance(const block *b, place *p) {
    for (i64 k = p->axes; k-- > 0; p->at[k] = 0) {
        i64 a = p->axis[k], by = ++p->at[k] < b->length[a] ? 1 : 1 - b->length[a];
        p->x += by * b->from[a], p->out += by * b->to[a];
        p->slice += by * b->slice[a], p->local += by * b->local[a];
        if (by == 1) return 1;
    }
    return 0;
}

/* The axis whose slices lie side by side in memory, `beside` elements of each; -1 for rows, where
   many elements of one slice do. */
static i64 lanes_of(const block *b, i64 *beside) {
    i64 last = b->axes - 1, n = b->length[last];
    *beside = b->slice[last] ? 1 : n;
    if (b->slice[last]) return last;
    int touch = last && b->from[last - 1] == n * b->from[last] && b->to[last - 1] == n * b->to[last];
    return touch && n < SHORT && b->slice[last - 1] ? last - 1 : -1;
}

/* ---- sums */

static void add_columns(const block *b, const char *x, i64 n, i64 stride, i64 width, i64 base, i64 beside,
                        i64 period) {
    i64 size = b->type == FLOAT64 ? 8 : 4, step = b->from[b->axes - 1];
    if (SIZE[b->type] != size || !is_plain(b, x, step) || stride % size) {
        char *in = b->scratch->in;
        for (i64 i = 0; i < n; i++) {
            const void *row = load(b, x + i * stride, width, step, in + i * LANES * size);
            if (row != in + i * LANES * size) __builtin_memcpy(in + i * LANES * size, row, width * size);
        }
        x = in, stride = LANES * size;
    }
    CALL(b, add_columns, b, (const void *)x, n, stride / size, width, base, beside, period);
}

/* Add up all elements of a box of at most LANES slices, in the order of memory. */
static void sum_box(const block *b) {
    work *w = b->scratch;
    i64 beside, lanes = lanes_of(b, &beside), last = b->axes - 1, along = -1;
    place p = {.x = b->x};
    for (i64 a = 0; a < lanes; a++)
        if (!b->slice[a]) along = a; /* lanes run along the last reduced axis outside of them */
    for (i64 a = 0; a < (lanes < 0 ? last : lanes); a++)
        if (a != along) p.axis[p.axes++] = a;
    i64 outer = lanes < 0 && p.axes ? p.axis[--p.axes] : -1, rows = outer < 0 ? 1 : b->length[outer];
    do {
        for (i64 r = 0; r < rows && lanes < 0; r++) {
            i64 n = b->length[last], step = b->from[last], k = p.local + (outer < 0 ? 0 : r * b->local[outer]);
            const char *x = p.x + (outer < 0 ? 0 : r * b->from[outer]);
            for (i64 i = 0, m; i < n; i += m) {
                m = least(RUN, n - i);
                const void *run = load(b, x + i * step, m, step, w->in);
                CALL(b, add_row, b, run, m, w->sums + k * b->limbs_of_slice, w->flags + k);
            }
            if (w->count) CALL(b, flush, b, w->sums + k * b->limbs_of_slice);
        }
        if (lanes < 0) continue;
        i64 period = b->length[lanes], width = beside * period, n = along < 0 ? 1 : b->length[along];
        i64 stride = along < 0 ? 0 : b->from[along], fold = 1;
        if (stride == width * b->from[last]) /* several rows of a narrow matrix side by side */
            fold = least(LANES / width, n / ROWS) > 1 ? least(LANES / width, n / ROWS) : 1;
        i64 even = n - n % fold;
        for (i64 i = 0; i < even; i += fold * ROWS)
            add_columns(b, p.x + i * stride, least(ROWS, (even - i) / fold), fold * stride, fold * width,
                        p.local, beside, period);
        if (n > even)
            add_columns(b, p.x + even * stride, 1, 0, (n - even) * width, p.local, beside, period);
    } while (advance(b, &p));
}

/* ---- from a sum to the norm and the factor

   The bound holds exactly because every rounding is on the safe side. float16, bfloat16 and float32: a
   factor of 29 bits, rounded down, makes each product exact in float64, and the product is rounded
   toward zero. float64: the factor is lowered by a little more than the half unit that rounding the
   product to nearest can add. Below the normal range that half unit is not relative any more: where
   the limit is so small that this matters, subnormal results are rounded toward zero. */

static leading leading_of(const i64 *limbs, i64 count, i64 first) {
    i64 top = count - 1, more = 0;
    while (top >= 0 && !limbs[top]) top--;
    if (top < 0) return (leading){0, 0, 0, -(1 << 20)};
    u64 t[5];
    for (i64 i = 0; i < 5; i++) t[i] = top >= i ? limbs[top - i] : 0;
    int left = __builtin_clz((u32)t[0]), right = 32 - left;
    for (i64 i = 0; i < top - 4; i++) more |= limbs[i] != 0;
    return (leading){
        .high = (t[0] << 32 | t[1]) << left | t[2] >> right,
        .low = (t[2] << 32 | t[3]) << left | t[4] >> right,
        .more = more | ((u32)(t[4] << left) != 0),
        .exponent = 32 * (first + top - 3) - left,
    };
}

/* Sign of the sum less (m * 2**e)**power, for m below 2**55. */
static int compared(leading s, u64 m, i64 e, i64 power) {
    leading t = leading_of_integer(power == 2 ? (u128)m * m : m, power * e);
    if (s.exponent != t.exponent) return s.exponent > t.exponent ? 1 : -1;
    if (s.high != t.high) return s.high > t.high ? 1 : -1;
    return s.low != t.low ? (s.low > t.low ? 1 : -1) : (int)s.more;
}

/* The float64 nearest to the root of the sum, ties to even, from one that lies close. */
static double nearest(leading s, double r, i64 power) {
    for (;;) {
        i64 bits = bits_of(r), field = bits >> 52, one = (i64)1 << 52;
        i64 m = (bits & (one - 1)) | (field ? one : 0), e = (field ? field : 1) - 1075;
        int up = field == 2047 ? -1 : compared(s, 2 * m + 1, e - 1, power);
        int fine = m == one && field > 1; /* steps below a power of two are half as long */
        int down = !bits ? 1 : fine ? compared(s, 4 * m - 1, e - 2, power) : compared(s, 2 * m - 1, e - 1, power);
        if (up > 0 || (up == 0 && m & 1))
            r = double_of(bits + 1);
        else if (down < 0 || (down == 0 && m & 1))
            r = double_of(bits - 1);
        else
            return r;
    }
}

/* Take the sum of a slice of a box, by its number there, and its limit. */
static void begin_slice(const block *b, i64 local, i64 k, leading sum) {
    work *w = b->scratch;
    i64 exponent = sum.exponent + 75, odd = b->power == 2 && exponent & 1;
    double limit = b->limit[b->limits * k];
    w->sum[local] = sum;
    /* root in [2**26, 2**27): 53 bits of the sum, and 53 below them */
    w->upper[local] = (double)(i64)(sum.high >> 11) * (1 + odd);
    w->lower[local] = (double)(i64)((sum.high & 2047) << 42 | sum.low >> 22) * 0x1p-53 * (1 + odd);
    w->half[local] = b->power == 2 ? (exponent - odd) / 2 : exponent + 26;
    w->mantissa[local] = split(limit < 0 ? 0 : limit, w->power + local);
}

/* Find the roots of all slices of a box, and the factors that bring them to their limits. */
static void find_roots(const block *b, i64 n) {
    work *w = b->scratch;
    /* float64: half a unit for the product, half for this sum, and some for subnormal results */
    double slack = b->type == FLOAT64 ? 0x1.08p-52 : 0x1p-29;
    for (i64 k = 0; k < n; k++) {
        double high = w->upper[k], low = w->lower[k], first = __builtin_sqrt(high), square = first * first;
        double delta = (((high - square) - error_of(first, first, square)) + low) / (2 * first);
        double sum = high + low, below = (high - sum) + low, root = first + delta;
        w->root[k] = b->power == 1 ? sum * 0x1p-26 : root;
        w->rest[k] = b->power == 1 ? below * 0x1p-26 : (first - root) + delta;
    }
    for (i64 k = 0; k < n; k++) {
        double c = w->mantissa[k], root = w->root[k], q = c / root, product = q * root;
        double correction = (((c - product) - error_of(q, root, product)) - q * w->rest[k]) / root;
        w->factor[k] = q + (correction - q * slack);
    }
}

/* Norm, factor and what goes with it of slice k: a pure function of the sum, its flags and the limit. */
static void decide(const block *b, i64 local, i64 k, int flags) {
    const work *w = b->scratch;
    double limit = b->limit[b->limits * k], root = w->root[local], away = __builtin_fabs(w->rest[local]);
    leading sum = w->sum[local];
    i64 half = w->half[local];
    limit = limit < 0 ? 0 : limit;
    /* 100 bits decide the norm unless they are within 2**-40 of halfway between two float64 */
    double norm = sum.high ? scaled(root, half) : 0, gap = (double_of(bits_of(root) + 1) - root) / 2;
    int tie = __builtin_fabs(away - gap) <= gap * 0x1p-40 || __builtin_fabs(away - gap / 2) <= gap * 0x1p-40;
    if (sum.high && (tie || half < -1040)) norm = nearest(sum, norm, b->power);
    b->norm[k] = flags & NAN_MET ? double_of(QUIET) : flags ? __builtin_inf() : norm;
    b->factor[k] = 1.0;
    if (limit == __builtin_inf()) return; /* wins over all that follows */
    if (b->toward_zero) b->toward_zero[k] = limit < b->tiny;
    if (flags & NAN_MET || limit != limit) {
        b->factor[k] = double_of(QUIET);
        return;
    }
    i64 power = w->power[local];
    int above = norm > limit;
    if (norm == limit) above = compared(sum, (u64)(w->mantissa[local] * 0x1p53), power - 53, b->power) > 0;
    if (flags)
        b->factor[k] = 0.0;
    else if (above) {
        double mantissa = w->factor[local];
        i64 exponent = power - half;
        if (b->type != FLOAT64)
            mantissa = double_of(bits_of(mantissa) & -(1 << 24));
        else if (exponent < -900) /* or the product of a float64 would be rounded twice */
            b->shift[k] = (i32)exponent + 900, exponent = -900;
        b->factor[k] = scaled(mantissa, exponent);
    }
}

/* Carry the limbs of a slice, leave zeros, and take them for its partial sum or for its leading bits. */
static leading carried(block *b, i64 *limbs, i64 slice) {
    work *w = b->scratch;
    i64 sums[138], carry = 0, first = w->used[0], stop = w->used[1];
    if (stop) stop = least(stop + 2, b->limbs_of_slice);
    for (i64 i = first; i < stop; i++) {
        carry += limbs[i];
        sums[i] = carry & 0xFFFFFFFF;
        carry >>= 32;
        limbs[i] = 0;
        if (b->limbs && sums[i]) {
            b->limbs[i * b->slices + slice] = (u32)sums[i];
            b->used[0] = least(b->used[0], i), b->used[1] = -least(-b->used[1], -i - 1);
        }
    }
    return b->limbs ? (leading){0} : leading_of(sums + first, stop - first, first + FIRST[b->type]);
}

/* Finish the slices of a box: their partial sums, or their norms and factors. */
static void finish_box(block *b) {
    work *w = b->scratch;
    i64 slices = 0, inner = -1;
    place p = {.slice = b->base};
    for (i64 a = 0; a < b->axes; a++)
        if (b->slice[a]) p.axis[p.axes++] = inner = a;
    if (p.axes) p.axes--;
    i64 n = inner < 0 ? 1 : b->length[inner], step = inner < 0 ? 0 : b->slice[inner];
    place again = p;
    do
        for (i64 i = 0; i < n; i++, slices++) {
            i64 k = p.local + i, slice = p.slice + i * step, *limbs = w->sums + k * b->limbs_of_slice;
            b->flags[slice] = w->flags[k];
            if (b->alone && !b->limbs) {
                begin_slice(b, k, slice, CALL(b, leading_of_one, *limbs, b->power));
                *limbs = 0;
                continue;
            }
            i64 magnitude = *limbs;
            if (b->alone) *limbs = 0, CALL(b, put_element, w, limbs, b->power, magnitude);
            leading sum = carried(b, limbs, slice);
            if (!b->limbs) begin_slice(b, k, slice, sum);
        }
    while (advance(b, &p));
    if (!b->limbs) {
        find_roots(b, slices);
        do
            for (i64 i = 0; i < n; i++) decide(b, again.local + i, again.slice + i * step, w->flags[again.local + i]);
        while (advance(b, &again));
    }
    __builtin_memset(w->flags, 0, slices);
    w->used[0] = b->limbs_of_slice, w->used[1] = 0;
}

/* ---- rescaling */

/* Find the factors of n lanes: `beside` lanes of each of `period` slices, from slice k on, and again. */
static void begin_lanes(const block *b, i64 n, i64 k, i64 beside, i64 step, i64 period) {
    work *w = b->scratch;
    w->special = w->cut = 0;
    for (i64 j = 0, part = 0, at = 0; j < n; j++) {
        i64 slice = k + at * step, toward_zero = b->toward_zero && b->toward_zero[slice];
        w->scale[j] = b->factor[slice];
        w->unit[j] = toward_zero ? power_of_two(b->lowest) : 0;
        w->shift[j] = b->shift ? b->shift[slice] : 0;
        w->cut |= toward_zero;
        w->special |= !(w->scale[j] > 0) || w->shift[j] || (toward_zero && b->type == FLOAT64);
        if (++part == beside) part = 0, at = at + 1 < period ? at + 1 : 0;
    }
}

static void rescale_box(const block *b) {
    work *w = b->scratch;
    i64 beside, lanes = lanes_of(b, &beside), last = b->axes - 1, size = SIZE[b->type];
    i64 from = b->from[last], to = b->to[last];
    i64 each = lanes >= 0, outer = each ? lanes : last, period = each ? b->length[lanes] : 1;
    i64 width = beside * period, n = width, most = each ? RUN - RUN % beside : RUN, strip = each ? most : n;
    /* rows of few lanes that touch are one row of the same lanes again and again */
    if (each && outer && !b->slice[outer - 1] && 2 * width <= RUN && b->from[outer - 1] == width * from &&
        b->to[outer - 1] == width * to)
        n *= b->length[--outer], most = RUN - RUN % width, strip = n;
    for (i64 i = 0; i < n; i += strip) {
        place p = {.x = b->x, .out = b->out, .slice = b->base + (each ? i / beside * b->slice[lanes] : 0)};
        i64 found = -1, stop = least(n, i + strip);
        for (i64 a = 0; a < outer; a++) p.axis[p.axes++] = a;
        do {
            if (found != p.slice)
                begin_lanes(b, each ? least(most, stop - i) : 1, p.slice, beside, each ? b->slice[lanes] : 0, period);
            found = p.slice;
            if (!each && w->scale[0] == 1.0 && b->x == b->out) continue;
            for (i64 k = i; k < stop; k += most) {
                i64 m = least(most, stop - k);
                char *at = p.out + k * to, *out = size > 2 && is_plain(b, at, to) ? at : w->out;
                CALL(b, multiply, b, load(b, p.x + k * from, m, from, w->in), (void *)out, m, each);
                if (out != at) store(b, out, at, m, to);
            }
        } while (advance(b, &p));
    }
}

/* ---- boxes: as many slices as the scratch has room for, and of rows as many as the cache */

static void each_box(block *b) {
    i64 slices = 1, bytes = SIZE[b->type], a = -1, beside, rows = lanes_of(b, &beside) < 0;
    for (i64 i = b->axes; i-- > 0;) {
        b->local[i] = b->slice[i] ? slices : 0;
        bytes *= b->length[i];
        if (b->slice[i] && b->length[i] > 1) slices *= b->length[i], a = i;
    }
    i64 n = a < 0 ? 1 : b->length[a], step = (rows ? LANES / SHORT : LANES / beside) / (slices / n);
    if (rows) step = least(step, CACHE / (bytes / n));
    if (step < 1) step = 1;
    if (step >= n) {
        sum_box(b);
        finish_box(b);
        if (b->out) rescale_box(b);
        return;
    }
    block part = *b;
    for (i64 i = 0; i < n; i += step) {
        part.length[a] = least(step, n - i), part.base = b->base + i * b->slice[a];
        part.x = b->x + i * b->from[a], part.out = b->out ? b->out + i * b->to[a] : b->out;
        each_box(&part);
    }
    b->used[0] = part.used[0], b->used[1] = part.used[1];
}

static void begin(block *b) {
    b->limbs_of_slice = LIMBS[b->type];
    b->scratch->zero = -32 * FIRST[b->type];
    b->alone = 1;
    for (i64 a = 0; a < b->axes; a++) b->alone &= b->slice[a] || b->length[a] == 1;
    b->alone |= b->largest;
    if (b->alone && !b->limbs) b->limbs_of_slice = 1;
    b->scratch->used[0] = b->used[0] = b->limbs_of_slice;
    b->scratch->used[1] = b->used[1] = 0;
}

/* Sum every slice, exactly; with an `out`, write it clipped. */
API void sum_slices(block *b) {
    begin(b);
    each_box(b);
}

/* Norms and factors of slices whose sums are given: limbs used[0] (with its sign) to used[1]. */
API void finalize_slices(block *b) {
    i64 limbs[160], count = b->used[1] - b->used[0];
    for (i64 base = 0, n; base < b->slices; base += n) {
        n = least(LANES, b->slices - base);
        for (i64 k = 0; k < n; k++) {
            for (i64 i = 0; i < count; i++) limbs[i] = b->limbs[i * b->slices + base + k];
            begin_slice(b, k, base + k, leading_of(limbs, count, b->used[0]));
        }
        find_roots(b, n);
        for (i64 k = 0; k < n; k++) decide(b, k, base + k, b->flags[base + k]);
    }
}

/* Multiply every slice by its factor. */
API void rescale_slices(block *b) {
    begin(b);
    rescale_box(b);
}

API i64 scratch_bytes(i64 type) { return sizeof(work) + 8 * LANES * LIMBS[type]; }
