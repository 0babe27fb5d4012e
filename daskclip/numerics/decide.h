/* From the sum of a slice to its norm and its factor, read by kernel.c.

   The bound holds exactly because every rounding is on the safe side. float16, bfloat16 and
   float32: a factor of 29 bits, rounded down, makes each product exact in float64, and the product
   is rounded toward zero. float64: the factor is lowered by a little more than the half unit that
   rounding the product to nearest can add. Below the normal range that half unit is not relative
   any more: where the limit is so small that this matters, subnormal results are rounded toward
   zero.

   Normalizing, a slice whose norm lies in a band that ends at its limit c stays as it is, so that
   doing it again changes nothing if every other slice gets into the band. With eps = 2**(1 - bits),
   the band reaches down to (1 - w * eps) * c - e, where 1.625 <= w <= 1.875 and e is the norm of a
   slice whose elements are all the smallest subnormal. e is nothing, and the band within 2 eps of
   c, unless c is about as small as the norm of a slice of the smallest normal numbers.
   - float16, bfloat16, float32: the factor is lowered by less than 2**-27, 0.07 eps, and truncation
     takes less than eps of a normal element, and less than the smallest subnormal of another.
   - float64: the sum that gives the factor is rounded, by up to eps / 2, after it was lowered by
     0.54 eps. If it was rounded down, the factor is lowered by 0.54 to 1.04 eps, and products
     rounded to nearest take eps / 2 more. If it was rounded up, the factor is lowered by 0.04 to
     0.54 eps, so that products rounded to nearest could exceed the bound. All of them are rounded
     toward zero then, which takes less than eps. Both are 1.54 eps.
   The norm of elements of which each is lowered by d of itself and e more is lowered by no more
   than d of itself and the norm of the e. So it is at least (1 - 1.6 eps) * c - e. */

enum {
    NO_EXPONENT = -(1 << 20), /* of a sum of 0: below all others */
    NEAR_SUBNORMAL = -1040,   /* from here on down, root * 2**half may be subnormal */
    MIN_FACTOR = -900,        /* exponents of a factor of float64: its products are normal, */
    MAX_FACTOR = 900,         /* and it is finite */
    HUGE = 990,               /* exponent of norms up to which error_of is finite for sure */
};

/* The sum m * 2**unit. */
static leading leading_of_integer(u128 m, i64 unit) {
    if (!m) return (leading){0, 0, 0, NO_EXPONENT};
    i64 up = m >> 64 ? __builtin_clzll(m >> 64) : 64 + __builtin_clzll(m);
    m <<= up;
    return (leading){m >> 64, (u64)m, 0, unit - up};
}

/* The sum of limbs `step` apart, of which the first weighs 2**(32 * first). */
static leading leading_of(const u32 *limbs, i64 step, i64 count, i64 first) {
    i64 top = count - 1, more = 0;
    while (top >= 0 && !limbs[top * step]) top--;
    if (top < 0) return (leading){0, 0, 0, NO_EXPONENT};
    u64 t[5]; /* 128 bits that begin inside a limb */
    for (i64 i = 0; i < 5; i++) t[i] = top >= i ? limbs[(top - i) * step] : 0;
    int left = __builtin_clz((u32)t[0]), right = 32 - left;
    for (i64 i = 0; i < top - 4; i++) more |= limbs[i * step] != 0;
    return (leading){
        .high = (t[0] << 32 | t[1]) << left | t[2] >> right,
        .low = (t[2] << 32 | t[3]) << left | t[4] >> right,
        .more = more | ((u32)(t[4] << left) != 0),
        .exponent = 32 * (first + top - 3) - left,
    };
}

/* Sign of the sum less (m * 2**e)**power, for m below 2**55. */
static int compare(leading s, u64 m, i64 e, i64 power) {
    leading t = leading_of_integer(power == 2 ? (u128)m * m : m, power * e);
    if (s.exponent != t.exponent) return s.exponent > t.exponent ? 1 : -1;
    if (s.high != t.high) return s.high > t.high ? 1 : -1;
    return s.low != t.low ? (s.low > t.low ? 1 : -1) : (int)s.more;
}

/* The same for the midpoint between the float64 of these bits and the next one. */
static int compare_midpoint(leading s, i64 bits, i64 power) {
    i64 field = bits >> 52, one = (i64)1 << 52, m = (bits & (one - 1)) | (field ? one : 0);
    return field == 0x7FF ? -1 : compare(s, 2 * m + 1, (field ? field : 1) - 1076, power);
}

/* The float64 nearest to the root of the sum, ties to even, from one that lies close. */
static double round_root(leading s, double r, i64 power) {
    i64 bits = bits_of(r), step;
    do {
        int above = compare_midpoint(s, bits, power), odd = bits & 1;
        int below = bits ? compare_midpoint(s, bits - 1, power) : 1;
        step = above > 0 || (above == 0 && odd) ? 1 : below < 0 || (below == 0 && odd) ? -1 : 0;
        bits += step;
    } while (step);
    return double_of(bits);
}

/* Take the sum and the limit of a slice, which is number k of its box. */
static void prepare_root(const block *b, i64 k, i64 slice, leading sum) {
    work *w = b->scratch;
    /* (upper + lower) * 2**exponent: 53 of the 64 bits of high, and the next 53; the power of two
       is made even, so that the root has half of it and lies in [2**26, 2**27) */
    i64 exponent = sum.exponent + 64 + 11, odd = b->power == 2 && exponent & 1;
    double limit = b->limit[b->limits * slice];
    w->slice[k] = slice, w->sum[k] = sum;
    w->upper[k] = (double)(i64)(sum.high >> 11) * (1 + odd);
    w->lower[k] = (double)(i64)((sum.high & 0x7FF) << 42 | sum.low >> 22) * 0x1p-53 * (1 + odd);
    w->half[k] = b->power == 2 ? (exponent - odd) / 2 : exponent + 26;
    w->limit[k] = limit < 0 ? 0 : limit;
    w->mantissa[k] = split(w->limit[k], w->power + k);
    /* an element may have all of the norm, and beyond the ceiling there is no number for it */
    if (!b->normalize || !(w->limit[k] > b->ceiling) || w->limit[k] == INF) return;
    double ceiling = split(b->ceiling, &exponent);
    if (compare(sum, (u64)(ceiling * 0x1p53), exponent - 53, b->power) <= 0)
        w->limit[k] = b->ceiling, w->mantissa[k] = ceiling, w->power[k] = exponent;
}

/* Compute the roots of n sums, and the factors that bring them to their limits, to 100 bits. */
static void compute_roots(const block *b, i64 n) {
    work *w = b->scratch;
    /* float64: half a unit for the product, half for this sum, and some for subnormal results;
       normalizing, nothing for the sum: `up` is above 0 where it was rounded up */
    double slack = b->type != FLOAT64 ? 0x1p-29 : b->normalize ? 0x1.1p-53 : 0x1.08p-52;
    for (i64 k = 0; k < n; k++) {
        double high = w->upper[k], low = w->lower[k], first = __builtin_sqrt(high);
        double square = first * first, error = error_of(first, first, square);
        double delta = (((high - square) - error) + low) / (2 * first), root = first + delta;
        double sum = high + low, below = (high - sum) + low;
        w->root[k] = b->power == 1 ? sum * 0x1p-26 : root;
        w->rest[k] = b->power == 1 ? below * 0x1p-26 : (first - root) + delta;
    }
    for (i64 k = 0; k < n; k++) {
        double c = w->mantissa[k], root = w->root[k], q = c / root, product = q * root;
        double correction = (((c - product) - error_of(q, root, product)) - q * w->rest[k]) / root;
        double added = correction - q * slack;
        w->factor[k] = q + added, w->up[k] = (w->factor[k] - q) - added;
    }
}

/* The factor that brings a slice to its limit. */
static double factor_of(const block *b, i64 k) {
    const work *w = b->scratch;
    i64 exponent = w->power[k] - w->half[k];
    if (b->type != FLOAT64) /* 29 of 53 bits */
        return scaled(double_of(bits_of(w->factor[k]) & -(1 << (53 - 29))), exponent);
    i64 kept = max(MIN_FACTOR, min(exponent, MAX_FACTOR)); /* or products would be rounded twice */
    if (kept != exponent) b->shift[w->slice[k]] = (i32)(exponent - kept);
    /* beyond 2**HUGE, each product is scaled by itself for its error, as subnormal ones are */
    int huge = w->power[k] > HUGE || w->half[k] + 27 > HUGE;
    if (b->normalize && w->up[k] > 0) b->toward_zero[w->slice[k]] |= huge ? ALL | SUBNORMAL : ALL;
    return scaled(w->factor[k], kept);
}

/* Whether the norm of a slice is below the band that ends at its limit, and above 0. */
static int below_band(const block *b, i64 k) {
    const work *w = b->scratch;
    /* in units of a quarter of the last bit of the limit, which is not above the ceiling if it can
       be reached from below */
    i64 unit = w->power[k] - 55;
    double limit = w->mantissa[k] * 0x1p55, width = 13 * limit * power_of_two(-2 - b->normalize);
    width += scaled(b->error, -64 - unit);
    return w->sum[k].high && w->limit[k] <= b->ceiling && width < limit &&
           compare(w->sum[k], (u64)limit - (u64)width - 1, unit, b->power) < 0;
}

/* Decide norm and factor of n slices: pure functions of the sum, its flags and the limit. */
static void decide(const block *b, i64 n) {
    const work *w = b->scratch;
    compute_roots(b, n);
    for (i64 k = 0; k < n; k++) {
        leading sum = w->sum[k];
        i64 slice = w->slice[k], flags = b->flags[slice] & (NAN_MET | INF_MET);
        double root = w->root[k], rest = __builtin_fabs(w->rest[k]), limit = w->limit[k];
        double norm = sum.high ? scaled(root, w->half[k]) : 0;
        /* 100 bits decide the norm unless they are within 2**-40 of a tie; below a power of two,
           that is half as far away */
        double gap = (double_of(bits_of(root) + 1) - root) / 2, close = gap * 0x1p-40;
        int tie = __builtin_fabs(rest - gap) <= close || __builtin_fabs(rest - gap / 2) <= close;
        if (sum.high && (tie || w->half[k] < NEAR_SUBNORMAL))
            norm = round_root(sum, norm, b->power);
        int above = norm > limit;
        if (norm == limit) /* the root itself may be larger */
            above = compare(sum, (u64)(w->mantissa[k] * 0x1p53), w->power[k] - 53, b->power) > 0;
        b->norm[slice] = flags & NAN_MET ? QUIET_NAN : flags ? INF : norm;
        if (b->toward_zero) b->toward_zero[slice] = limit < b->truncate_below ? SUBNORMAL : 0;
        int moves = above || (b->normalize && below_band(b, k));
        double factor = flags & NAN_MET ? QUIET_NAN : flags ? 0.0 : moves ? factor_of(b, k) : 1.0;
        if (b->zero && flags) b->norm[slice] = 0.0, factor = ZEROS;
        if (limit != limit) factor = QUIET_NAN;
        b->factor[slice] = limit == INF ? 1.0 : factor; /* no limit wins over NaN */
    }
}
