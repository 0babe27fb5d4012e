/* Loops over runs of elements, read twice by kernel.c: for float and for double.

   T          type of the elements; BITS the integer of its size, BIN a bin of squares
   MANTISSA   bits of the mantissa that are stored; NONE, the exponent field of NaN and infinity
   BIAS       an element with exponent field e lies below 2**(e - BIAS)
   DEEP       how far below the largest exponent the grids still hold every bit of a square
   UNIT       an element is m * 2**(max(e, 1) - UNIT) with an integer m
   COPIES     of the bins, so that the additions of neighbours do not wait for each other

   The grids. Adding 1.5 * 2**(52 - g) to a number below 1 rounds it to a multiple of 2**-g and leaves
   that multiple in the low bits of the sum. Added up as integers nothing rounds any more, so the order
   does not matter. Elements are scaled by one power of two for the whole run, so that the largest lies
   below 1 (or, the same, the grids are). The square is cut on the grids 2**-50, 2**-100 and, for double,
   2**-150. A float has 24 bits and, above 2**-27 of the largest (DEEP = 26), a square that is exact in
   double and a multiple of 2**-100. A double has 53 bits and, above 2**-23, a product and an error of it
   that are multiples of 2**-150. Each part is below 2**50: an int64 holds the sum of 2**12 of them. Where
   the run spans more, one grid more reaches 25 powers of two further (`deep`). */

#ifndef NAME
#define PASTE(a, b) a##b
#define JOIN(a, b) PASTE(a, b)
#define NAME(function) JOIN(function, T)
#define BITS JOIN(bits_, T)
#define BIN JOIN(bin_, T)
#define WIDE (sizeof(T) == 8)
#define MANTISSA (WIDE ? 52 : 23)
#define NONE (WIDE ? 2047 : 255)
#define BIAS (WIDE ? 1022 : 126)
#define DEEP (WIDE ? 22 : 26)
#define UNIT (WIDE ? 1075 : 150)
#define COPIES (WIDE ? 1 : 4)
#define ABS ((BITS)(((u64)1 << (8 * sizeof(T) - 1)) - 1))
#define INFINITE ((BITS)((i64)NONE << MANTISSA))
#endif

/* Find the largest magnitude of a run by its bits, NaN above infinity above all, and the bits of the
   smallest but zero, less one: ABS if all are zero. */
static void NAME(scan_)(const T *x, i64 n, BITS *top, BITS *low) {
    const BITS *bits = (const BITS *)x;
    BITS t = 0, l = ABS;
    for (i64 i = 0; i < n; i++) {
        BITS v = bits[i] & ABS, less = (v - 1) & ABS;
        t = v > t ? v : t, l = less < l ? less : l;
    }
    *top = t, *low = l;
}

/* Grids that a run with these bits needs: 0 for the usual ones, 1 for one more, 2 where none reach. */
static inline int NAME(reach_)(BITS top, BITS low) {
    i64 span = (i64)(top >> MANTISSA) - (i64)(((u64)low + 1) >> MANTISSA);
    return top >= INFINITE || span > DEEP + 25 ? 2 : span > DEEP;
}

/* Scale of the elements of a run, or, where no square leaves the range of double, that of the grids. */
static inline double NAME(scale_)(BITS top, int power) {
    i64 e = top >> MANTISSA;
    return power_of_two(WIDE ? BIAS - e : power * (e - BIAS));
}

/* Add an element, or its square, on each grid. */
static INLINE void NAME(cut_)(T x, int power, int deep, double scale, i64 *s0, i64 *s1, i64 *s2, i64 *s3) {
    double grid0 = WIDE ? GRID0 : GRID0 * scale, grid1 = WIDE ? GRID1 : GRID1 * scale;
    double v = WIDE ? x * scale : x, p = power == 2 ? v * v : __builtin_fabs(v);
    double t = p + grid0, r = p - (t - grid0), u = r + grid1, rest = r - (u - grid1);
    *s0 += bits_of(t), *s1 += bits_of(u);
    if (!WIDE && deep) *s2 += bits_of(rest + GRID2 * scale);
    if (!WIDE) return;
    double e = power == 2 ? error_of(v, v, p) : 0.0;
    /* what is left of p, where v is tiny, joins what is left of the error once that is exact */
    double third = rest + GRID2, below = rest - (third - GRID2);
    if (!deep) e += rest;
    double first = e + GRID1, left = e - (first - GRID1), second = left + GRID2;
    *s1 += bits_of(first), *s2 += bits_of(second);
    if (deep) *s2 += bits_of(third), *s3 += bits_of(((left - (second - GRID2)) + below) + GRID3);
}

/* Add the sums of n elements to the limbs of a slice. */
static INLINE void NAME(put_sums_)(work *w, i64 *limbs, int power, int deep, BITS top, i64 n, i64 s0, i64 s1,
                                   i64 s2, i64 s3) {
    i64 unit = power * ((i64)(top >> MANTISSA) - BIAS);
    double scale = WIDE ? 1.0 : NAME(scale_)(top, power);
    put(w, limbs, unit - 50, s0 - n * bits_of(GRID0 * scale));
    put(w, limbs, unit - 100, s1 - n * bits_of(GRID1 * scale) * (1 + WIDE));
    if (deep || WIDE) put(w, limbs, unit - 150, s2 - n * bits_of(GRID2 * scale) * (deep && WIDE ? 2 : 1));
    if (deep && WIDE) put(w, limbs, unit - 200, s3 - n * bits_of(GRID3));
}

static INLINE void NAME(add_run_)(work *w, i64 *limbs, const T *x, i64 n, int power, int deep, BITS top) {
    i64 s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    double scale = NAME(scale_)(top, power);
    for (i64 i = 0; i < n; i++) NAME(cut_)(x[i], power, deep, scale, &s0, &s1, &s2, &s3);
    NAME(put_sums_)(w, limbs, power, deep, top, n, s0, s1, s2, s3);
}

/* The integer of an element. */
static inline BITS NAME(integer_)(BITS v) {
    BITS e = v >> MANTISSA;
    return v - ((e - (e > 0)) << MANTISSA);
}

/* Add one element, or its square, to the limbs of a slice. */
static inline void NAME(put_element_)(work *w, i64 *limbs, int power, BITS v) {
    i64 e = v >> MANTISSA, unit = power * ((e ? e : 1) - UNIT);
    BITS m = NAME(integer_)(v);
    BIN square = (BIN)m * (power == 2 ? m : 1);
    put(w, limbs, unit, (i64)(square & (((u64)1 << 53) - 1)));
    if (square >> 53) put(w, limbs, unit + 53, (i64)(square >> 53));
}

/* The sum of one magnitude, or of its square. */
static leading NAME(leading_of_one_)(BITS v, int power) {
    i64 e = v >> MANTISSA;
    BITS m = NAME(integer_)(v);
    return leading_of_integer((u128)(u64)m * (power == 2 ? (u64)m : 1), power * ((e ? e : 1) - UNIT));
}

/* Add elements of any spread one by one. NaN and infinity set flags and are left out; where NaN does not
   count, so is the other part of a complex element. `lane` tells the part of strided elements. */
static void NAME(add_each_)(const block *b, const T *x, i64 n, i64 stride, i64 lane, i64 *limbs, u8 *flags) {
    for (i64 i = 0; i < n; i++) {
        const BITS *a = (const BITS *)x + i * stride;
        BITS v = *a & ABS;
        if (b->paired && (a[(stride == 1 ? i : lane) & 1 ? -1 : 1] & ABS) > INFINITE) continue;
        if (v >= INFINITE)
            *flags |= v == INFINITE ? INF_MET : b->omit ? 0 : NAN_MET;
        else if (b->alone)
            limbs[0] = v > limbs[0] ? (i64)v : limbs[0];
        else
            NAME(put_element_)(b->scratch, limbs, b->power, v);
    }
}

/* Add squares of any spread to bins, one for each exponent, where up to 2**16 integers are added exactly. */
static void NAME(add_to_bins_)(const block *b, const T *x, i64 n, u8 *flags) {
    const BITS *bits = (const BITS *)x;
    BIN *bins = (BIN *)b->scratch->bins, square[MANY];
    u32 field[MANY], nan = 0, infinite = 0;
    for (i64 i = 0; i < n; i += MANY) {
        i64 m = least(MANY, n - i);
        for (i64 j = 0; j < m; j++) {
            BITS v = bits[i + j] & ABS, whole = NAME(integer_)(v);
            nan |= v > INFINITE, infinite |= v == INFINITE;
            field[j] = v >> MANTISSA, square[j] = (BIN)whole * whole;
        }
        for (i64 j = 0; j < m; j++) bins[j % COPIES * (NONE + 1) + field[j]] += square[j];
    }
    *flags |= (nan && !b->omit ? NAN_MET : 0) | (infinite ? INF_MET : 0);
    b->scratch->count += n;
}

/* Move the bins to the limbs of a slice; that of NaN and infinity is let go. */
static void NAME(flush_)(const block *b, i64 *limbs) {
    BIN *bins = (BIN *)b->scratch->bins;
    for (i64 e = 0; e <= NONE; e++) {
        i64 unit = 2 * ((e ? e : 1) - UNIT);
        BIN sum = 0;
        for (i64 k = 0; k < COPIES; k++) sum += bins[k * (NONE + 1) + e], bins[k * (NONE + 1) + e] = 0;
        for (; sum && e < NONE; sum >>= 48, unit += 48) put(b->scratch, limbs, unit, (i64)(sum & 0xFFFFFFFFFFFF));
    }
    b->scratch->count = 0;
}

/* Add a run of at most RUN elements to the limbs of a slice, or to the bins. */
static void NAME(add_row_)(const block *b, const T *x, i64 n, i64 *limbs, u8 *flags) {
    work *w = b->scratch;
    BITS top, low;
    NAME(scan_)(x, n, &top, &low);
    int reach = NAME(reach_)(top, low);
    if (b->alone && top < INFINITE)
        limbs[0] = top > limbs[0] ? (i64)top : limbs[0];
    else if (reach == 2 && (n < MANY || b->power == 1 || b->paired))
        NAME(add_each_)(b, x, n, 1, 0, limbs, flags);
    else if (reach == 2) {
        if (w->count > 1 << 15) NAME(flush_)(b, limbs);
        NAME(add_to_bins_)(b, x, n, flags);
    } else if (top && b->power == 2)
        reach ? NAME(add_run_)(w, limbs, x, n, 2, 1, top) : NAME(add_run_)(w, limbs, x, n, 2, 0, top);
    else if (top)
        reach ? NAME(add_run_)(w, limbs, x, n, 1, 1, top) : NAME(add_run_)(w, limbs, x, n, 1, 0, top);
}

static INLINE void NAME(scan_lanes_)(const T *restrict x, i64 n, BITS *restrict top, BITS *restrict low) {
    const BITS *bits = (const BITS *)x;
    for (i64 j = 0; j < n; j++) {
        BITS v = bits[j] & ABS, less = (v - 1) & ABS;
        top[j] = v > top[j] ? v : top[j], low[j] = less < low[j] ? less : low[j];
    }
}

static INLINE void NAME(add_lanes_)(const T *x, i64 n, i64 stride, i64 width, int power, int deep, work *w) {
    double *restrict scale = w->scale;
    i64 *restrict s0 = w->s[0], *restrict s1 = w->s[1], *restrict s2 = w->s[2], *restrict s3 = w->s[3];
    for (i64 i = 0; i < n; i++, x += stride) {
        const T *restrict row = x;
        for (i64 j = 0; j < width; j++)
            NAME(cut_)(row[j], power, deep, scale[j], s0 + j, s1 + j, s2 + j, s3 + j);
    }
}

/* Add n rows of lanes side by side: `beside` lanes of each of `period` slices from `base` on, and again. */
static void NAME(add_columns_)(const block *b, const T *x, i64 n, i64 stride, i64 width, i64 base,
                               i64 beside, i64 period) {
    work *w = b->scratch;
    BITS *top = (BITS *)w->top, *low = (BITS *)w->low;
    int deep = 0, p = b->power;
    for (i64 j = 0; j < width; j++) top[j] = 0, low[j] = ABS, w->s[0][j] = w->s[1][j] = w->s[2][j] = w->s[3][j] = 0;
    for (i64 i = 0; i < n; i++) NAME(scan_lanes_)(x + i * stride, width, top, low);
    for (i64 j = 0; j < width; j++) {
        w->scale[j] = NAME(scale_)(top[j], p);
        deep |= NAME(reach_)(top[j], low[j]) == 1;
    }
    if (!b->alone && deep)
        p == 2 ? NAME(add_lanes_)(x, n, stride, width, 2, 1, w) : NAME(add_lanes_)(x, n, stride, width, 1, 1, w);
    else if (!b->alone)
        p == 2 ? NAME(add_lanes_)(x, n, stride, width, 2, 0, w) : NAME(add_lanes_)(x, n, stride, width, 1, 0, w);
    for (i64 j = 0, k = base, part = 0; j < width; j++) {
        i64 *limbs = w->sums + k * b->limbs_of_slice;
        int partner = b->paired && top[j ^ 1] > INFINITE; /* its NaN leaves out the whole element */
        if (b->alone && top[j] < INFINITE)
            limbs[0] = top[j] > limbs[0] ? (i64)top[j] : limbs[0];
        else if (partner || NAME(reach_)(top[j], low[j]) == 2)
            NAME(add_each_)(b, x + j, n, stride, j, limbs, w->flags + k);
        else if (top[j])
            NAME(put_sums_)(w, limbs, p, deep, top[j], n, w->s[0][j], w->s[1][j], w->s[2][j], w->s[3][j]);
        if (++part == beside) part = 0, k = k + 1 < base + period ? k + 1 : base;
    }
}

/* The product with a factor that keeps the bound. float: a factor of 29 bits makes it exact in double; it
   is cut to the bits of the dtype. double: the factor is low enough for rounding to nearest. */
static inline double NAME(product_)(T a, double factor, i64 keep) {
    return WIDE ? a * factor : double_of(bits_of((double)a * factor) & keep);
}

/* The same, cut to multiples of the smallest subnormal: adding the grid rounds it to one, which may be
   larger. What lies beyond the reach of the grid has no bits below that unit. */
static inline T NAME(cut_product_)(T a, double factor, i64 keep, double unit) {
    double p = NAME(product_)(a, factor, keep), size = __builtin_fabs(p), grid = unit * 0x1.8p52;
    double t = (size + grid) - grid, cut = t > size ? t - unit : t;
    return (T)__builtin_copysign(size < unit * 0x1p51 ? cut : size, p);
}

/* The product with any factor: 1 leaves an element as it is, NaN makes NaN, as 0 does of infinity; those
   of double may keep a power of two apart, or ask for subnormal results that are rounded toward zero. */
static T NAME(any_product_)(T a, double factor, i64 keep, i64 shift, double unit) {
    if (factor == 1.0) return a;
    if (factor != factor || (factor == 0.0 && __builtin_fabs((double)a) == __builtin_inf())) return (T)double_of(QUIET);
    if (!WIDE) return NAME(cut_product_)(a, factor, keep, unit);
    double p = scaled(a * factor, shift);
    if (unit != 0.0 && factor != 0.0) {
        /* y has room for all bits of the product: where p is larger, it was rounded up */
        i64 exponent;
        double mantissa = split(factor, &exponent);
        i64 up = __builtin_fabs(a) < 1.0 ? 100 : 0;
        double y = __builtin_fabs(scaled(a, up) * mantissa);
        if (__builtin_fabs(scaled(p, up - shift - exponent)) > y) p = double_of(bits_of(p) - 1);
    }
    return (T)p;
}

/* Multiply a run by the factors that `begin_lanes` has found: one, or one for each lane. */
static void NAME(multiply_)(const block *b, const T *x, T *out, i64 n, int each) {
    const work *w = b->scratch;
    const double *f = w->scale, *unit = w->unit, factor = f[0];
    i64 keep = b->keep;
    if (w->special)
        for (i64 j = 0; j < n; j++)
            out[j] = NAME(any_product_)(x[j], f[each * j], keep, w->shift[each * j], unit[each * j]);
    else if (each && w->cut)
        INDEPENDENT for (i64 j = 0; j < n; j++)
            out[j] = f[j] == 1.0 ? x[j] : NAME(cut_product_)(x[j], f[j], keep, unit[j]);
    else if (each)
        INDEPENDENT for (i64 j = 0; j < n; j++)
            out[j] = f[j] == 1.0 ? x[j] : (T)NAME(product_)(x[j], f[j], keep);
    else if (factor == 1.0)
        INDEPENDENT for (i64 j = 0; j < n; j++) out[j] = x[j];
    else if (w->cut)
        INDEPENDENT for (i64 j = 0; j < n; j++) out[j] = NAME(cut_product_)(x[j], factor, keep, *unit);
    else
        INDEPENDENT for (i64 j = 0; j < n; j++) out[j] = (T)NAME(product_)(x[j], factor, keep);
}
