/* Loops over runs of elements, read twice by kernel.c: for float and for double.

   T          type of the elements; BITS the integer of its size, SQUARE one for their squares
   MANTISSA   bits of the mantissa that are stored
   NONFINITE  the exponent field of NaN and infinity
   BIAS       an element with exponent field e lies below 2**(e - BIAS)
   REACH      how far below the largest exponent the grids still hold every bit of a square
   UNIT       an element is m * 2**(max(e, 1) - UNIT) with an integer m
   COPIES     of the bins, so that the additions of neighbours do not wait for each other

   The grids. Adding 1.5 * 2**(52 - g) to a number below 1 rounds it to a multiple of 2**-g and
   leaves that multiple in the low bits of the sum. Elements are scaled by one power of two for the
   whole run, so that the largest lies below 1 (or, the same, the grids are). The square is cut on
   the grids 2**-50, 2**-100 and, for double, 2**-150. A float has 24 bits and, above 2**-27 of the
   largest (REACH = 26), a square that is exact in double and a multiple of 2**-100. A double has 53
   bits and, above 2**-23, a product and an error of it that are multiples of 2**-150. Each part is
   below 2**50: an int64 holds the sum of 2**12 of them. Where the run spans more, one grid more
   reaches EXTRA = 25 powers of two further. */

#ifndef NAME
#define PASTE(a, b) a##b
#define JOIN(a, b) PASTE(a, b)
#define NAME(function) JOIN(function, T)
#define BITS JOIN(bits_, T)
#define SQUARE JOIN(square_, T)
#define WIDE (sizeof(T) == 8)
#define MANTISSA (WIDE ? 52 : 23)
#define NONFINITE (WIDE ? 2047 : 255)
#define BIAS (WIDE ? 1022 : 126)
#define REACH (WIDE ? 22 : 26)
#define EXTRA 25
#define UNIT (WIDE ? 1075 : 150)
#define COPIES (WIDE ? 1 : 4)
#define ABS ((BITS)(((u64)1 << (8 * sizeof(T) - 1)) - 1))
#define INFINITE ((BITS)((i64)NONFINITE << MANTISSA))
#define GRID0 0x1.8p2 /* 1.5 * 2**(52 - 50) */
#define GRID1 0x1.8p-48
#define GRID2 0x1.8p-98
#define GRID3 0x1.8p-148
/* A loop whose arrays, x and out, are the same or do not overlap. */
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
/* A call for each power and number of grids, so that no loop decides for each element. */
#define SPECIALIZED(function, power, extra, ...) \
    ((power) == 2 ? (extra) ? function(2, 1, __VA_ARGS__) : function(2, 0, __VA_ARGS__) \
                  : (extra) ? function(1, 1, __VA_ARGS__) : function(1, 0, __VA_ARGS__))
/* Whether an element stays as it is, where `nan` says whether it may be NaN. */
#define KEPT(a, factor) ((factor) == 1.0 || (nan && (a) != (a)))
enum { USUAL_GRIDS, EXTRA_GRID, NO_GRIDS };
#endif

/* Find the bits of the largest magnitude of a run, where NaN is above infinity, and those of the
   smallest except zeros, less one: ABS if all are zero. */
static void NAME(scan_)(const T *x, i64 n, BITS *top, BITS *low) {
    const BITS *bits = (const BITS *)x;
    BITS t = 0, l = ABS;
    for (i64 i = 0; i < n; i++) {
        BITS v = bits[i] & ABS, less = (v - 1) & ABS;
        t = v > t ? v : t, l = less < l ? less : l;
    }
    *top = t, *low = l;
}

/* The same for n lanes side by side, one row after the other. */
static INLINE void NAME(scan_lanes_)(const T *restrict x, i64 n, BITS *restrict top,
                                     BITS *restrict low) {
    const BITS *bits = (const BITS *)x;
    for (i64 j = 0; j < n; j++) {
        BITS v = bits[j] & ABS, less = (v - 1) & ABS;
        top[j] = v > top[j] ? v : top[j], low[j] = less < low[j] ? less : low[j];
    }
}

/* Grids that elements need whose largest and smallest magnitude have these bits. */
static inline int NAME(grids_)(BITS top, BITS low) {
    i64 span = (i64)(top >> MANTISSA) - (i64)(((u64)low + 1) >> MANTISSA);
    if (top >= INFINITE || span > REACH + EXTRA) return NO_GRIDS;
    return span > REACH ? EXTRA_GRID : USUAL_GRIDS;
}

/* Scale of the elements of a run, or, where no square leaves the range of double, of the grids. */
static inline double NAME(scale_)(BITS top, int power) {
    i64 e = top >> MANTISSA;
    return power_of_two(WIDE ? BIAS - e : power * (e - BIAS));
}

/* Add an element, or its square, to the sums on each grid, which lie `apart`. */
static INLINE void NAME(cut_)(int power, int extra, T x, double scale, i64 *s, i64 apart) {
    double grid0 = WIDE ? GRID0 : GRID0 * scale, grid1 = WIDE ? GRID1 : GRID1 * scale;
    double v = WIDE ? x * scale : x, p = power == 2 ? v * v : __builtin_fabs(v);
    double t = p + grid0, r = p - (t - grid0), u = r + grid1, rest = r - (u - grid1);
    s[0] += bits_of(t), s[apart] += bits_of(u);
    if (!WIDE && extra) s[2 * apart] += bits_of(rest + GRID2 * scale);
    if (!WIDE) return;
    double e = power == 2 ? error_of(v, v, p) : 0.0;
    /* what is left of p, where v is small, joins what is left of the error once that is exact */
    double third = rest + GRID2, below = rest - (third - GRID2);
    if (!extra) e += rest;
    double first = e + GRID1, left = e - (first - GRID1), second = left + GRID2;
    s[apart] += bits_of(first), s[2 * apart] += bits_of(second);
    if (!extra) return;
    s[2 * apart] += bits_of(third);
    s[3 * apart] += bits_of(((left - (second - GRID2)) + below) + GRID3);
}

/* Add the sums of n elements to the limbs of a slice. */
static INLINE void NAME(add_sums_)(int power, int extra, work *w, i64 *limbs, BITS top, i64 n,
                                   const i64 *s, i64 apart) {
    i64 unit = power * ((i64)(top >> MANTISSA) - BIAS);
    double scale = WIDE ? 1.0 : NAME(scale_)(top, power);
    i64 one = n * bits_of(GRID1 * scale), two = n * bits_of(GRID2 * scale);
    add_part(w, limbs, unit - 50, s[0] - n * bits_of(GRID0 * scale));
    add_part(w, limbs, unit - 100, s[apart] - (WIDE ? 2 * one : one));
    if (WIDE && extra) two *= 2;
    if (WIDE || extra) add_part(w, limbs, unit - 150, s[2 * apart] - two);
    if (extra && WIDE) add_part(w, limbs, unit - 200, s[3 * apart] - n * bits_of(GRID3));
}

static INLINE void NAME(add_run_)(int power, int extra, work *w, i64 *limbs, const T *x, i64 n,
                                  BITS top) {
    i64 s[4] = {0};
    double scale = NAME(scale_)(top, power);
    for (i64 i = 0; i < n; i++) NAME(cut_)(power, extra, x[i], scale, s, 1);
    NAME(add_sums_)(power, extra, w, limbs, top, n, s, 1);
}

static INLINE void NAME(add_lanes_)(int power, int extra, work *w, const T *x, i64 n, i64 stride,
                                    i64 width) {
    const double *restrict scale = w->scale;
    i64 *restrict s = w->s;
    for (i64 i = 0; i < n; i++, x += stride) {
        const T *restrict row = x;
        for (i64 j = 0; j < width; j++)
            NAME(cut_)(power, extra, row[j], scale[j], s + j, LANES);
    }
}

/* The integer of an element, or its square, in units of 2**unit. */
static inline SQUARE NAME(integer_)(BITS v, int power, i64 *unit) {
    BITS e = v >> MANTISSA, m = v - ((e - (e > 0)) << MANTISSA);
    *unit = power * ((i64)(e ? e : 1) - UNIT);
    return (SQUARE)m * (power == 2 ? m : 1);
}

/* Add one finite magnitude, or its square, to the limbs of a slice. */
static inline void NAME(add_element_)(work *w, i64 *limbs, int power, BITS v) {
    i64 unit;
    SQUARE m = NAME(integer_)(v, power, &unit);
    add_part(w, limbs, unit, (i64)(m & (((u64)1 << 53) - 1)));
    if (m >> 53) add_part(w, limbs, unit + 53, (i64)(m >> 53));
}

/* Add elements of any spread one by one. NaN and infinity set flags and are left out; where NaN is
   omitted, so is the other part of a complex element: the parts are adjacent, and `lane` tells
   which part strided elements are. */
static void NAME(add_each_)(const block *b, const T *x, i64 n, i64 stride, i64 lane, i64 *limbs,
                            u8 *flags) {
    work *w = b->scratch;
    i64 nan_met = b->omit ? NAN_OMITTED : NAN_MET;
    for (i64 i = 0; i < n; i++) {
        const BITS *a = (const BITS *)x + i * stride;
        BITS v = *a & ABS;
        if (b->paired && (a[(stride == 1 ? i : lane) & 1 ? -1 : 1] & ABS) > INFINITE)
            *flags |= NAN_OMITTED;
        else if (v >= INFINITE)
            *flags |= v == INFINITE ? INF_MET : nan_met;
        else if (w->largest)
            limbs[0] = max(limbs[0], v);
        else
            NAME(add_element_)(w, limbs, b->power, v);
    }
}

/* Add squares of any spread to bins, one for each exponent, which hold the sum of up to 2**16. */
static void NAME(add_to_bins_)(const block *b, const T *x, i64 n, u8 *flags) {
    const BITS *bits = (const BITS *)x;
    SQUARE *bins = (SQUARE *)b->scratch->bins, square[BIN_RUN];
    u32 field[BIN_RUN], nan = 0, infinite = 0;
    for (i64 i = 0, unit; i < n; i += BIN_RUN) {
        i64 m = min(BIN_RUN, n - i);
        for (i64 j = 0; j < m; j++) {
            BITS v = bits[i + j] & ABS;
            nan |= v > INFINITE, infinite |= v == INFINITE;
            field[j] = v >> MANTISSA, square[j] = NAME(integer_)(v, 2, &unit);
        }
        for (i64 j = 0; j < m; j++) bins[j % COPIES * (NONFINITE + 1) + field[j]] += square[j];
    }
    *flags |= (nan ? b->omit ? NAN_OMITTED : NAN_MET : 0) | (infinite ? INF_MET : 0);
    b->scratch->binned += n;
}

/* Move the bins to the limbs of a slice, except the bin of NaN and infinity. */
static void NAME(empty_bins_)(work *w, i64 *limbs) {
    SQUARE *bins = (SQUARE *)w->bins;
    for (i64 e = 0; e <= NONFINITE; e++) {
        i64 unit = 2 * ((e ? e : 1) - UNIT);
        SQUARE sum = 0;
        for (SQUARE *bin = bins + e; bin < bins + COPIES * (NONFINITE + 1); bin += NONFINITE + 1)
            sum += *bin, *bin = 0;
        for (; sum && e < NONFINITE; sum >>= 48, unit += 48)
            add_part(w, limbs, unit, (i64)(sum & 0xFFFFFFFFFFFF));
    }
    w->binned = 0;
}

/* Add a run of at most RUN elements to the limbs of a slice, or to the bins. */
static void NAME(add_row_)(const block *b, const T *x, i64 n, i64 *limbs, u8 *flags) {
    work *w = b->scratch;
    BITS top, low;
    NAME(scan_)(x, n, &top, &low);
    int grids = NAME(grids_)(top, low);
    if (w->largest && top < INFINITE)
        limbs[0] = max(limbs[0], top);
    else if (grids == NO_GRIDS && (n < BIN_RUN || b->power == 1 || b->paired))
        NAME(add_each_)(b, x, n, 1, 0, limbs, flags);
    else if (grids == NO_GRIDS) {
        if (w->binned > 1 << 15) NAME(empty_bins_)(w, limbs);
        NAME(add_to_bins_)(b, x, n, flags);
    } else if (top)
        SPECIALIZED(NAME(add_run_), b->power, grids, w, limbs, x, n, top);
}

/* Add n rows of lanes side by side, in turn those of each slice from `local` on. */
static void NAME(add_columns_)(const block *b, const T *x, i64 n, i64 stride, i64 width, i64 local,
                               lanes l) {
    work *w = b->scratch;
    BITS *top = (BITS *)w->top, *low = (BITS *)w->low;
    int extra = 0;
    for (i64 j = 0; j < width; j++) {
        top[j] = 0, low[j] = ABS;
        w->s[j] = w->s[j + LANES] = w->s[j + 2 * LANES] = w->s[j + 3 * LANES] = 0;
    }
    for (i64 i = 0; i < n; i++) NAME(scan_lanes_)(x + i * stride, width, top, low);
    for (i64 j = 0; j < width; j++) {
        w->scale[j] = NAME(scale_)(top[j], b->power);
        extra |= NAME(grids_)(top[j], low[j]) == EXTRA_GRID;
    }
    if (!w->largest) SPECIALIZED(NAME(add_lanes_), b->power, extra, w, x, n, stride, width);
    for (i64 j = 0, k = local, part = 0; j < width; j++) {
        i64 *limbs = w->sums + k * w->limbs_of_slice;
        int partner = b->paired && top[j ^ 1] > INFINITE; /* its NaN leaves out the whole element */
        if (w->largest && top[j] < INFINITE)
            limbs[0] = max(limbs[0], top[j]);
        else if (partner || NAME(grids_)(top[j], low[j]) == NO_GRIDS)
            NAME(add_each_)(b, x + j, n, stride, j, limbs, w->flags + k);
        else if (top[j])
            NAME(add_sums_)(b->power, extra, w, limbs, top[j], n, w->s + j, LANES);
        if (++part == l.repeat) part = 0, k = k + 1 < local + l.slices ? k + 1 : local;
    }
}

/* The product with a factor, which keeps the bound. float: a factor of 29 bits makes it exact in
   double, and it is truncated to the bits of the dtype. double: the factor is so low that the
   product may be rounded to nearest. */
static inline double NAME(product_)(T a, double factor, i64 mask) {
    return WIDE ? a * factor : double_of(bits_of((double)a * factor) & mask);
}

/* The same, truncated. float: to a multiple of the smallest subnormal; adding the grid rounds it to
   one, which may be larger, and products beyond the grid are multiples of it. double: to 53 bits,
   where there is a unit; the product y with the mantissa of the factor, scaled so that its error is
   exact, tells whether p was rounded up. */
static inline T NAME(truncated_)(T a, double factor, i64 mask, double unit) {
    if (WIDE) {
        i64 one = (i64)1023 << 52, e = (bits_of(factor) & ((i64)0x7FF << 52)) - one;
        double v = __builtin_fabs((double)a), p = v * factor, up = v < 1.0 ? 0x1p64 : 1.0;
        double m = double_of(bits_of(factor) - e), y = v * up * m;
        double size = p * up * double_of(one - e);
        int above = (size > y) | ((size == y) & (error_of(v * up, m, y) < 0));
        return (T)__builtin_copysign(double_of(bits_of(p) - (above & (unit > 0))), a);
    }
    double p = NAME(product_)(a, factor, mask), size = __builtin_fabs(p), grid = unit * 0x1p52;
    double t = (size + grid) - grid, cut = t > size ? t - unit : t;
    return (T)__builtin_copysign(size < unit * 0x1p51 ? cut : size, p);
}

/* The product with any factor: 1 leaves an element as it is, ZEROS makes it 0, NaN makes NaN, as 0
   does of infinity, and always the same one; those of double may keep a power of two apart, or ask
   for subnormal results to be truncated, or all, by a unit or two. */
static T NAME(any_product_)(T a, double factor, i64 mask, i64 shift, double unit) {
    if (factor == 1.0) return a;
    if (factor == ZEROS) return 0;
    if (factor != factor || (factor == 0.0 && __builtin_fabs((double)a) == INF))
        return (T)QUIET_NAN;
    if (a != a) return a;
    if (!WIDE) return NAME(truncated_)(a, factor, mask, unit);
    double p = scaled(a * factor, shift);
    if (unit != 0.0 && factor != 0.0) {
        /* y and its error are scaled to be normal, unlike the product: where p is larger, it was
           rounded up */
        i64 exponent, up = __builtin_fabs(a) < 1.0 ? 200 : -200;
        double mantissa = split(factor, &exponent), v = scaled(__builtin_fabs(a), up);
        double y = v * mantissa, size = scaled(__builtin_fabs(p), up - shift - exponent);
        int all = unit > power_of_two(LOWEST[FLOAT64]) && error_of(v, mantissa, y) < 0;
        if (size > y || (all && size == y)) p = double_of(bits_of(p) - 1);
    }
    return (T)p;
}

/* Multiply a run by the factors that `begin_lanes` has found: one, or one for each lane. `nan`:
   whether there may be NaN, whose bits a multiplication would change. */
static INLINE void NAME(multiply_run_)(const block *b, const T *x, T *out, i64 n, int each,
                                       int nan) {
    const work *w = b->scratch;
    const double *f = w->scale, *unit = w->unit, factor = f[0];
    i64 mask = -((i64)1 << (53 - DIGITS[b->type]));
    if (w->special)
        for (i64 j = 0; j < n; j++) {
            i64 k = each * j;
            out[j] = NAME(any_product_)(x[j], f[k], mask, w->shift[k], unit[k]);
        }
    else if (each && w->truncate)
        INDEPENDENT for (i64 j = 0; j < n; j++)
            out[j] = KEPT(x[j], f[j]) ? x[j] : NAME(truncated_)(x[j], f[j], mask, unit[j]);
    else if (each)
        INDEPENDENT for (i64 j = 0; j < n; j++)
            out[j] = KEPT(x[j], f[j]) ? x[j] : (T)NAME(product_)(x[j], f[j], mask);
    else if (factor == 1.0)
        INDEPENDENT for (i64 j = 0; j < n; j++) out[j] = x[j];
    else if (w->truncate)
        INDEPENDENT for (i64 j = 0; j < n; j++)
            out[j] = KEPT(x[j], 0) ? x[j] : NAME(truncated_)(x[j], factor, mask, *unit);
    else
        INDEPENDENT for (i64 j = 0; j < n; j++)
            out[j] = KEPT(x[j], 0) ? x[j] : (T)NAME(product_)(x[j], factor, mask);
}

static void NAME(multiply_)(const block *b, const T *x, T *out, i64 n, int each) {
    if (b->scratch->nan)
        NAME(multiply_run_)(b, x, out, n, each, 1);
    else
        NAME(multiply_run_)(b, x, out, n, each, 0);
}
