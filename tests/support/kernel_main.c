/* Runs the kernel on numbers made here and prints digests of what it gives: `tests/numerics/test_build.py`
   compares those of several machines and compilers. */
#include "../../daskclip/numerics/kernel.c"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLICES = 300, LENGTH = 200, COUNT = SLICES * LENGTH };

static u64 state;

static u64 any(void) { /* xorshift64 */
    state ^= state << 13, state ^= state >> 7;
    return state ^= state << 17;
}

static void digest(u64 *sum, const void *data, size_t bytes) { /* FNV-1a */
    for (size_t i = 0; i < bytes; i++) *sum = (*sum ^ ((const u8 *)data)[i]) * 0x100000001B3u;
}

/* Fill an array with finite numbers whose exponents lie within `spread` of a middle one. */
static void fill(char *x, i64 type, u64 spread) {
    const int mantissa[] = {10, 7, 23, 52}, middle[] = {15, 127, 127, 1023};
    i64 size = SIZE[type];
    for (i64 i = 0; i < COUNT; i++) {
        u64 exponent = middle[type] - spread + any() % (2 * spread + 1), sign = any() & 1;
        u64 v = (sign << (8 * size - 1)) | exponent << mantissa[type] | (any() >> (64 - mantissa[type]));
        v = any() % 8 ? v : 0;
        memcpy(x + i * size, &v, size);
    }
}

int main(void) {
    char *x = malloc(8 * COUNT), *out = malloc(8 * COUNT);
    double *factor = malloc(8 * SLICES), *norm = malloc(8 * SLICES);
    i32 *shift = malloc(4 * SLICES);
    u8 *toward_zero = malloc(SLICES), *flags = malloc(SLICES);
    u32 *limbs = malloc(4 * 138 * SLICES);
    const double limits[] = {1e-310, 1e-3, 1.0, 20.0};
    for (i64 kind = 0; kind < 4 * 2 * 3 * 4 * 3; kind++) {
        i64 type = kind % 4, columns = kind / 4 % 2, order = kind / 8 % 3, limit = kind / 24 % 4;
        const u64 spreads[] = {1, 14, type == FLOAT64 ? 1000 : type == FLOAT16 ? 14 : 120};
        u64 sum = 0xCBF29CE484222325u;
        state = kind + 1;
        fill(x, type, spreads[kind / 96]);
        block b = {.axes = 2, .type = type, .power = order ? 2 - order % 2 : 1, .largest = order == 0,
                   .slices = SLICES, .limit = limits + limit, .truncate_below = 1e-300, .x = x, .out = out,
                   .factor = factor, .norm = norm, .shift = shift, .toward_zero = toward_zero, .flags = flags};
        i64 size = SIZE[type], kept = columns ? 1 : 0;
        b.length[kept] = SLICES, b.length[1 - kept] = LENGTH, b.slice[kept] = 1;
        b.from[0] = b.to[0] = size * b.length[1], b.from[1] = b.to[1] = size;
        b.scratch = calloc(1, scratch_bytes(type));
        memset(shift, 0, 4 * SLICES);
        sum_slices(&b);
        free(b.scratch);
        digest(&sum, out, size * COUNT), digest(&sum, norm, 8 * SLICES), digest(&sum, factor, 8 * SLICES);
        memset(limbs, 0, 4 * 138 * SLICES);
        b.out = NULL, b.limbs = limbs, b.used[1] = 0;
        b.scratch = calloc(1, scratch_bytes(type));
        sum_slices(&b);
        free(b.scratch);
        digest(&sum, limbs, 4 * LIMBS[type] * SLICES), digest(&sum, b.used, sizeof b.used);
        printf("%d %016llx\n", (int)kind, (unsigned long long)sum);
    }
    return 0;
}
