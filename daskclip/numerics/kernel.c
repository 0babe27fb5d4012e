/* Exact norms of the slices of an array, factors that bring them to their limits, and rescaling.

   Read in this order: this comment, runs.h (sums of runs of elements), decide.h (from a sum to the
   norm and the factor), elements.h (elements in memory), then the rest of this file (boxes of
   slices).

   1. Sums. The sum of the squares (ord 2) or of the magnitudes (ord 1) of a slice, or its largest
   magnitude (ord inf), is an integer of 32-bit limbs, as many as the dtype can need:

        ... | limb i + 1 | limb i | limb i - 1 | ...        limb i weighs 2**(32 * (FIRST + i))

   A limb is kept in an int64, so that up to 2**31 parts of either sign are added to it before they
   are carried, once, at the end. The parts come from runs of elements. A run is scaled by a power
   of two, so that its largest element lies below 1, and every square is cut on grids of exponents:

        bits that weigh    2**-1 ... 2**-50  2**-51 ... 2**-100  2**-101 ... 2**-150
        grid              |       s0        |        s1         |        s2         |
        square of 0.9     |1100111101011100 |001010001111010111 |                   |
        square of 2**-30  |                 |        1000000000 |                   |
        error of a square |                 |     0101100101001 |110111010011011    | only float64

   The elements of a run add their parts to s0, s1 and s2, which are int64. Cutting is exact, and
   so is the addition of integers. That is why no order, grouping or layout of the elements, no
   number of threads and no set of instructions changes a bit of the sum. Runs that span more
   exponents than the grids are added as integers: one by one, or in bins of equal exponent.

   2. Norms. The leading 128 bits of a sum give 100 bits of its root. These decide how the norm is
   rounded to float64, unless they lie very close to a tie: then the sum is compared with the tie
   in integers.

   3. Factors. The factor of a slice above its limit is limit / root, lowered so far that the norm
   of the rescaled elements, however these are rounded, is not above the limit. Normalizing, the
   factor of a slice below the band that ends at its limit is the same one, and above 1.

   The steps are done for a box of slices at a time, while its elements are in the cache.

   A new norm (`ord`) is an entry of ORDERS in partial.py. If it adds up a power of the magnitudes
   above 2, that is not all:
   - sums: `cut`, `integer`, the bins and SPECIALIZED in runs.h take the power, and the grids reach
     as far as its error; `square_` is too narrow for it, in `finish_box` too;
   - limbs: FIRST, LIMBS and MAX_LIMBS here, FORMATS in compiled.py and `state_nbytes` in partial.py
     are for squares;
   - norms: `prepare_root`, `compute_roots` and `compare` in decide.h take its root.

   Plain C11 without libc, libm or Python. Compile with -fwrapv (integer sums wrap), without
   contraction or fast-math (every addition rounds where it is written) and with
   -fno-strict-aliasing (elements are read as their bits). The caller provides a `block`, which is
   `Block` in compiled.py. */

#include <stdint.h>

#define API __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
/* A function of runs.h for the elements of a block. */
#define CALL(b, function, ...) \
    ((b)->type == FLOAT64 ? function##_double(__VA_ARGS__) : function##_float(__VA_ARGS__))

/* bits_ and square_: integers of the size of the elements, and of their squares */
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int32_t i32, bits_float;
typedef int64_t i64, bits_double;
typedef uint64_t u64, square_float;
typedef unsigned __int128 u128, square_double;

enum {
    AXES = 72,       /* NumPy has 64 at most, and one more for the parts of complex elements */
    RUN = 4096,      /* elements of a row that are added at a time: 2**12 */
    LANES = 1024,    /* lanes side by side, and slices of a box */
    ROWS = 64,       /* rows of lanes that are added at a time */
    BIN_RUN = 256,   /* elements of a run from which bins are faster */
    NARROW = 8,      /* adjacent elements of a slice below which they are lanes, not rows */
    CACHE = 1 << 17, /* bytes of rows that are summed and rescaled while they are in the cache */
    MAX_LIMBS = 138, /* the largest of LIMBS */
};
enum { NAN_MET = 1, INF_MET = 2, NAN_OMITTED = 4 };
enum { SUBNORMAL = 1, ALL = 2 }; /* products that are rounded toward zero */
enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 };
/* of each type: bytes, significant bits, exponent of the smallest subnormal; limbs of a sum */
static const i64 SIZE[] = {2, 2, 4, 8}, DIGITS[] = {11, 8, 24, 53};
static const i64 LOWEST[] = {-24, -133, -149, -1074};
static const i64 FIRST[] = {-11, -11, -11, -69}, LIMBS[] = {24, 24, 24, MAX_LIMBS};

#define QUIET_NAN double_of(0x7FF8000000000000)
#define INF __builtin_inf()
#define ZEROS (-1.0) /* a factor that makes any element +0.0 */

/* The leading 128 bits of a sum: it is (high * 2**64 + low) * 2**exponent, where the top bit of
   high is set, and a fraction of 2**exponent more, which is 0 if `more` is 0. */
typedef struct { u64 high, low; i64 more, exponent; } leading;

/* Memory of a call: zeros at first. */
typedef struct {
    i64 limbs_of_slice, unit_bit; /* unit_bit: position of the bit that weighs 1 in the limbs */
    i64 used[2]; /* limbs that may not be zero: the first, and one past the last */
    i64 largest; /* whether a sum is the largest magnitude: in slices of one element, too */
    i64 binned;  /* number of elements in the bins */
    u128 bins[2048];
    /* lanes of a box: bits of the largest and the smallest magnitude, and sums, grid by grid */
    u64 top[LANES], low[LANES];
    i64 s[4 * LANES];
    /* slices of a box: the root of sum is (root + rest) * 2**half, the limit mantissa * 2**power */
    i64 slice[LANES], half[LANES], power[LANES];
    double upper[LANES], lower[LANES], root[LANES], rest[LANES];
    double limit[LANES], mantissa[LANES], factor[LANES], up[LANES]; /* up: see compute_roots */
    leading sum[LANES];
    u8 flags[LANES];
    /* lanes of a run: scales, then factors; units that products are truncated to, or 0; shifts */
    double scale[RUN], unit[RUN];
    /* whether a product is truncated, or needs any_product, or an element is an omitted NaN */
    i64 shift[RUN], truncate, special, nan;
    char in[8 * LANES * ROWS], out[8 * RUN]; /* elements as floats or doubles */
    char raw[8 * RUN];                       /* elements as they are stored */
    i64 sums[];                              /* limbs of at most LANES slices */
} work;

/* An array as axes in the order of memory, and what is known or wanted of its slices. */
typedef struct {
    i64 length[AXES];
    i64 from[AXES], to[AXES];     /* bytes from an element of x, or of out, to the next */
    i64 slice[AXES], local[AXES]; /* the same in slices, of the array or a box; 0 if reduced */
    i64 axes, base, slices;       /* base: number of the first slice of this box */
    i64 type, swapped;            /* swapped: not in the byte order of this machine */
    i64 omit, paired;             /* leave out NaN; with it, the other part of a complex element */
    i64 zero, normalize;          /* make nonfinite slices zeros; 0, or the bits of below_band */
    i64 power, largest;           /* see Order in partial.py */
    i64 limits;                   /* 1 if each slice has a limit, 0 if all have the same */
    i64 used[2];                  /* limbs that are not zero in all slices: first, past the last */
    double truncate_below;        /* limits below which subnormal products are truncated */
    double error, ceiling;        /* 2**64 times e of decide.h; the largest number of all arrays */
    const char *x;
    char *out;
    const double *limit;
    double *factor, *norm;
    i32 *shift;                   /* power of two that a float64 is still to be multiplied by */
    u8 *toward_zero, *flags;
    u32 *limbs;                   /* by limb, then by slice */
    work *scratch;
} block;

/* Adjacent elements are lanes where few of them belong to the same slice: `repeat` of each of
   `slices` slices along an axis. Else they are rows: axis is -1, and `repeat` the length of one. */
typedef struct { i64 axis, repeat, slices, width; } lanes;

static inline i64 bits_of(double d) { return (union { double d; i64 i; }){.d = d}.i; }
static inline double double_of(i64 i) { return (union { double d; i64 i; }){.i = i}.d; }
static inline u32 bits_of_float(float f) { return (union { float f; u32 i; }){.f = f}.i; }
static inline float float_of(u32 i) { return (union { float f; u32 i; }){.i = i}.f; }
static inline i64 min(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 max(i64 a, i64 b) { return a > b ? a : b; }

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

/* The error of the rounded product p of a and b (Dekker, Veltkamp); exact if nothing underflows. */
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
static inline void add_part(work *w, i64 *limbs, i64 unit, i64 part) {
    if (!part) return; /* its unit may lie below all limbs */
    unit += w->unit_bit;
    i64 i = unit >> 5, shift = unit & 31;
    i64 low = (part & 0xFFFFFFFF) << shift, high = (part >> 32) << shift;
    limbs[i] += low & 0xFFFFFFFF;
    limbs[i + 1] += (i64)((u64)low >> 32) + (high & 0xFFFFFFFF);
    limbs[i + 2] += high >> 32;
    w->used[0] = min(w->used[0], i), w->used[1] = max(w->used[1], i + 3);
}

#define T float
#include "runs.h"
#undef T
#define T double
#include "runs.h"
#include "decide.h"
#include "elements.h"

/* ---- sums */

/* Add n rows of `width` lanes, `stride` bytes apart. */
static void add_columns(const block *b, const char *x, i64 n, i64 stride, i64 width, i64 local,
                        lanes l) {
    i64 size = b->type == FLOAT64 ? 8 : 4, step = b->from[b->axes - 1];
    if (SIZE[b->type] != size || !is_plain(b, x, step) || stride % size) {
        char *in = b->scratch->in;
        for (i64 i = 0; i < n; i++)
            read_elements(b, x + i * stride, width, step, in + i * LANES * size);
        x = in, stride = LANES * size;
    }
    CALL(b, add_columns, b, (const void *)x, n, stride / size, width, local, l);
}

/* Add up the elements of a box of lanes, along the last reduced axis outside of the lanes. */
static void sum_columns(const block *b, lanes l) {
    i64 along = l.axis - 1;
    while (along >= 0 && b->slice[along]) along--;
    cursor c = start(b, l.axis);
    i64 n = 1, stride = 0, fold = 1;
    if (along >= 0) n = b->length[along], stride = b->from[along], c.length[along] = 1;
    if (stride == l.width * b->from[b->axes - 1]) /* rows of a narrow matrix side by side */
        fold = max(1, min(LANES / l.width, n / ROWS));
    do
        for (i64 i = 0, side, rows; i < n; i += side * rows) {
            side = min(fold, n - i), rows = min(ROWS, (n - i) / side);
            add_columns(b, c.x + i * stride, rows, side * stride, side * l.width, c.local, l);
        }
    while (advance(b, &c));
}

/* Add up the elements of a box of rows. */
static void sum_rows(const block *b) {
    work *w = b->scratch;
    i64 last = b->axes - 1, n = b->length[last], step = b->from[last];
    cursor c = start(b, last);
    do {
        i64 *limbs = w->sums + c.local * w->limbs_of_slice;
        for (i64 i = 0; i < n; i += RUN) {
            const void *run = load(b, c.x + i * step, min(RUN, n - i), step, w->in);
            CALL(b, add_row, b, run, min(RUN, n - i), limbs, w->flags + c.local);
        }
        if (w->binned) CALL(b, empty_bins, w, limbs);
    } while (advance(b, &c));
}

/* Carry the sum of a slice and leave zeros; store it, or return its leading bits. */
static leading carry(block *b, i64 *limbs, i64 slice) {
    work *w = b->scratch;
    i64 first = w->used[0], stop = min(w->used[1] + 2, w->limbs_of_slice), sum = 0;
    u32 carried[MAX_LIMBS];
    for (i64 i = first; i < stop; i++, sum >>= 32) {
        sum += limbs[i], limbs[i] = 0;
        carried[i] = (u32)sum;
        if (!b->limbs || !carried[i]) continue;
        b->limbs[i * b->slices + slice] = carried[i];
        b->used[0] = min(b->used[0], i), b->used[1] = max(b->used[1], i + 1);
    }
    if (b->limbs) return (leading){0};
    return leading_of(carried + first, 1, stop - first, first + FIRST[b->type]);
}

/* Store the sums of the slices of a box, or their norms and factors. */
static void finish_box(block *b) {
    work *w = b->scratch;
    i64 k = 0;
    cursor c = start(b, b->axes);
    for (i64 a = 0; a < b->axes; a++) c.length[a] = b->slice[a] ? b->length[a] : 1;
    do {
        i64 *limbs = w->sums + k * w->limbs_of_slice, largest = limbs[0], unit;
        b->flags[c.slice] = w->flags[k], w->flags[k] = 0;
        if (w->largest) limbs[0] = 0;
        if (w->largest && !b->limbs) { /* there is one limb for the bits of the largest */
            u128 m = CALL(b, integer, largest, b->power, &unit);
            prepare_root(b, k, c.slice, leading_of_integer(m, unit));
        } else {
            if (w->largest) CALL(b, add_element, w, limbs, b->power, largest);
            leading sum = carry(b, limbs, c.slice);
            if (!b->limbs) prepare_root(b, k, c.slice, sum);
        }
        k++;
    } while (advance(b, &c));
    if (!b->limbs) decide(b, k);
    w->used[0] = w->limbs_of_slice, w->used[1] = 0;
}

/* ---- rescaling */

/* Take the factors of n lanes from slice k on. */
static void begin_lanes(const block *b, i64 n, i64 k, lanes l) {
    work *w = b->scratch;
    i64 step = l.axis < 0 ? 0 : b->slice[l.axis];
    w->special = w->truncate = w->nan = 0;
    for (i64 j = 0, part = 0, at = 0; j < n; j++) {
        i64 slice = k + at * step, toward_zero = b->toward_zero ? b->toward_zero[slice] : 0;
        w->scale[j] = b->factor[slice];
        w->unit[j] = toward_zero * power_of_two(LOWEST[b->type]);
        w->shift[j] = b->shift ? b->shift[slice] : 0;
        w->truncate |= toward_zero, w->nan |= b->flags[slice] & NAN_OMITTED;
        w->special |= !(w->scale[j] > 0) || w->shift[j];
        w->special |= toward_zero & SUBNORMAL && b->type == FLOAT64;
        if (++part == l.repeat) part = 0, at = at + 1 < l.slices ? at + 1 : 0;
    }
}

/* Multiply the elements of a box by the factors of their slices. */
static void rescale_box(const block *b) {
    work *w = b->scratch;
    lanes l = lanes_of(b);
    i64 last = b->axes - 1, from = b->from[last], to = b->to[last], each = l.axis >= 0, found = -1;
    i64 outer = each ? l.axis : last, n = each ? l.width : l.repeat, fits = l.width <= RUN;
    i64 most = RUN - RUN % (fits ? l.width : l.repeat);
    /* rows of few lanes that touch are one row of the same lanes again and again */
    if (each && fits && outer && !b->slice[outer - 1] && touch(b, outer - 1, n))
        n *= b->length[--outer];
    /* rows of more lanes than there is room for are rescaled in strips */
    for (i64 begin = 0, end; begin < n; begin = end) {
        end = fits ? n : min(n, begin + most);
        cursor c = start(b, outer);
        if (each) c.slice += begin / l.repeat * b->slice[l.axis];
        do {
            if (found != c.slice) begin_lanes(b, each ? min(most, n - begin) : 1, c.slice, l);
            found = c.slice;
            if (!each && w->scale[0] == 1.0 && b->x == b->out) continue;
            for (i64 i = begin; i < end; i += most) {
                i64 m = min(most, end - i), narrow = SIZE[b->type] == 2;
                char *at = b->out + c.out + i * to;
                char *out = narrow || !is_plain(b, at, to) ? w->out : at;
                CALL(b, multiply, b, load(b, c.x + i * from, m, from, w->in), (void *)out, m, each);
                if (out != at) write_elements(b, out, at, m, to);
            }
        } while (advance(b, &c));
    }
}

/* ---- boxes of slices */

/* Sum boxes, each of as many slices as the scratch has room for and, of rows, as the cache has. */
static void each_box(block *b) {
    lanes l = lanes_of(b);
    i64 slices = 1, bytes = SIZE[b->type], a = -1, rows = l.axis < 0;
    for (i64 i = b->axes; i-- > 0;) {
        b->local[i] = b->slice[i] ? slices : 0;
        bytes *= b->length[i];
        if (b->slice[i] && b->length[i] > 1) slices *= b->length[i], a = i;
    }
    i64 n = a < 0 ? 1 : b->length[a], step = LANES / (rows ? NARROW : l.repeat) / (slices / n);
    if (rows) step = min(step, CACHE / (bytes / n));
    step = max(step, 1);
    if (step >= n) {
        rows ? sum_rows(b) : sum_columns(b, l);
        finish_box(b);
        if (b->out) rescale_box(b);
        return;
    }
    block part = *b;
    for (i64 i = 0; i < n; i += step) {
        part.length[a] = min(step, n - i), part.base = b->base + i * b->slice[a];
        part.x = b->x + i * b->from[a], part.out = b->out ? b->out + i * b->to[a] : b->out;
        each_box(&part);
    }
    b->used[0] = part.used[0], b->used[1] = part.used[1];
}

/* Sum every slice: store the sums if there are `limbs`, else norms and factors, and clip. */
API void sum_slices(block *b) {
    work *w = b->scratch;
    i64 single = 1; /* whether slices have one element */
    for (i64 a = 0; a < b->axes; a++) single &= b->slice[a] || b->length[a] == 1;
    w->largest = b->largest || single;
    w->limbs_of_slice = w->largest && !b->limbs ? 1 : LIMBS[b->type];
    w->unit_bit = -32 * FIRST[b->type];
    w->used[0] = b->used[0] = w->limbs_of_slice;
    w->used[1] = b->used[1] = 0;
    each_box(b);
}

/* Multiply every slice by its factor. */
API void rescale_slices(block *b) { rescale_box(b); }

/* Compute norms and factors from sums: limbs used[0], which may be negative, to used[1]. */
API void finalize_slices(block *b) {
    i64 first = b->used[0], count = b->used[1] - first;
    for (i64 base = 0, n; base < b->slices; base += n) {
        n = min(LANES, b->slices - base);
        for (i64 k = base; k < base + n; k++)
            prepare_root(b, k - base, k, leading_of(b->limbs + k, b->slices, count, first));
        decide(b, n);
    }
}

API i64 block_bytes(void) { return sizeof(block); }
API i64 scratch_bytes(i64 type) { return sizeof(work) + 8 * LANES * LIMBS[type]; }
