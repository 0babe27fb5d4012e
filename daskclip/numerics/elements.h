/* Elements in memory, read by kernel.c: their bits, their layout, and walks over them. */

/* Bits of a float of the same value as a float16 or a bfloat16; NaN keeps its bits. */
static inline u32 widened(u16 h, i64 type) {
    u32 sign = (u32)(h & 0x8000) << 16, infinite = (h & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;
    if (type == BFLOAT16) return (u32)h << 16;
    return sign | infinite | bits_of_float(float_of((u32)(h & 0x7FFF) << 13) * 0x1p112f);
}

/* The inverse. Values have the bits of the dtype, except subnormals, which are rounded to even. */
static inline u16 narrowed(u32 v, i64 type) {
    u32 m = v & 0x7FFFFFFF, rounded = (v + 0x7FFF + (v >> 16 & 1)) >> 16;
    u32 subnormal = bits_of_float(float_of(m) + 0.5f) - 0x3F000000;
    if (type == BFLOAT16) return m > 0x7F800000 ? v >> 16 : rounded;
    u32 finite = m < 0x38800000 ? subnormal : (m - 0x38000000) >> 13;
    return (v >> 16 & 0x8000) | (m >= 0x7F800000 ? 0x7C00 | (m >> 13 & 0x3FF) : finite);
}

/* Copy n elements between strided memory and contiguous memory, and swap their bytes if need be. */
static void copy(const block *b, char *to, i64 to_step, const char *from, i64 from_step, i64 n) {
    i64 size = SIZE[b->type], flip = b->swapped ? size - 1 : 0;
    for (i64 i = 0; i < n; i++)
        for (i64 k = 0; k < size; k++) to[i * to_step + k] = from[i * from_step + (k ^ flip)];
}

/* Whether elements are contiguous, aligned and in the byte order of this machine. */
static inline int is_plain(const block *b, const char *p, i64 step) {
    i64 size = SIZE[b->type];
    return !b->swapped && step == size && !((uintptr_t)p & (size - 1));
}

/* Write n elements that lie `step` bytes apart to `to`, as floats or doubles. */
static void read_elements(const block *b, const char *p, i64 n, i64 step, char *to) {
    i64 type = b->type, size = SIZE[type], plain = size == 2 && is_plain(b, p, step);
    const u16 *h = (const u16 *)(plain ? p : b->scratch->raw);
    u32 *t = (u32 *)to;
    if (!plain) copy(b, size == 2 ? b->scratch->raw : to, size, p, step, n);
    if (size == 2)
        for (i64 i = 0; i < n; i++) t[i] = widened(h[i], type);
}

/* The inverse. */
static void write_elements(const block *b, char *from, char *p, i64 n, i64 step) {
    i64 type = b->type, size = SIZE[type], plain = size == 2 && is_plain(b, p, step);
    u16 *h = (u16 *)(plain ? p : b->scratch->raw);
    const u32 *f = (const u32 *)from;
    if (size == 2)
        for (i64 i = 0; i < n; i++) h[i] = narrowed(f[i], type);
    if (!plain) copy(b, p, step, size == 2 ? b->scratch->raw : from, size, n);
}

/* Elements as floats or doubles: where they are if that can be, else written to `to`. */
static INLINE const void *load(const block *b, const char *p, i64 n, i64 step, char *to) {
    if (SIZE[b->type] > 2 && is_plain(b, p, step)) return p;
    read_elements(b, p, n, step, to);
    return to;
}

/* A position on the first axes of a block, to visit in the order of memory. */
typedef struct {
    i64 axes, length[AXES], at[AXES];
    const char *x;
    i64 out, slice, local; /* out: bytes from b->out, which may be NULL */
} cursor;

static cursor start(const block *b, i64 axes) {
    cursor c = {.axes = axes, .x = b->x, .slice = b->base};
    for (i64 a = 0; a < axes; a++) c.length[a] = b->length[a];
    return c;
}

/* Go on to the next position, the last axis fastest; return 0 after the last one. */
static INLINE int advance(const block *b, cursor *c) {
    for (i64 a = c->axes; a-- > 0; c->at[a] = 0) {
        i64 by = ++c->at[a] < c->length[a] ? 1 : 1 - c->length[a];
        c->x += by * b->from[a], c->out += by * b->to[a];
        c->slice += by * b->slice[a], c->local += by * b->local[a];
        if (by == 1) return 1;
    }
    return 0;
}

/* Whether the rows of axis a, of n elements each, follow each other without a gap. */
static int touch(const block *b, i64 a, i64 n) {
    i64 last = b->axes - 1;
    return b->from[a] == n * b->from[last] && b->to[a] == n * b->to[last];
}

static lanes lanes_of(const block *b) {
    i64 a = b->axes - 1, n = b->slice[a] ? 1 : b->length[a];
    if (!b->slice[a] && a && n < NARROW && b->slice[a - 1] && touch(b, a - 1, n)) a--;
    return b->slice[a] ? (lanes){a, n, b->length[a], n * b->length[a]} : (lanes){-1, n, 1, 1};
}
