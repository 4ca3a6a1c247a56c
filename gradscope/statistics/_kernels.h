/* One pass over a tensor on a CPU instead of one per statistic, with sums in double.
 *
 * Every function reads contiguous memory, float32 or bfloat16. A double holds the squares, and the fourth
 * powers, of all float32 numbers, so that nothing here leaves the range.
 *
 * Loops run over LANES independent accumulators, which a compiler turns into vector instructions without
 * being allowed to reorder sums; where GCC does not see that, vector types say it. What a layer has just
 * written is partly in the cache; the rest comes from memory, and sooner when it is asked for early, since
 * the processor's own prefetching ends at each page.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define CHUNK ((size_t)1 << 20)   /* so many elements are counted in 32 bits */
#define RELEASE ((size_t)1 << 16) /* from so many on other threads may run meanwhile */
#define INFINITY_BITS 0x7f800000
#define CANCELLATION 1e-7 /* below this share of the mean square a variance is taken about the mean */
#define LINE 64 /* bytes of a cache line */
#define AHEAD 4096 /* bytes; an address past the end is no error */
#define FETCH(x) __builtin_prefetch((const void *)((uintptr_t)(x) + AHEAD))

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define VECTOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTOR
#endif

#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

typedef uint16_t bf16;

static inline int32_t bits_f32(const float *x) {
    int32_t bits;
    memcpy(&bits, x, sizeof bits);
    return bits;
}

static inline int32_t bits_bf16(const bf16 *x) { return (int32_t)((uint32_t)*x << 16); }

static inline float load_f32(const float *x) { return *x; }

static inline float load_bf16(const bf16 *x) {
    int32_t bits = bits_bf16(x);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Eight elements, in float64. */
typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));

/* Written out, GCC loads and converts all eight in one instruction each. */
#define ALL(x) {(x)[0], (x)[1], (x)[2], (x)[3], (x)[4], (x)[5], (x)[6], (x)[7]}
#define EIGHT_f32(x, to) ((to) = (Doubles)ALL(x))
#define EIGHT_bf16(x, to)                   \
    do {                                    \
        Words words = (Words)ALL(x) << 16;  \
        Floats floats = (Floats)words;      \
        (to) = (Doubles)ALL(floats);        \
    } while (0)

INLINE double total(const Doubles *lanes) {
    Doubles sum = lanes[0];
    for (int j = 1; j < LANES / 8; j++) sum += lanes[j];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

typedef struct {
    double sum, squares;
    int64_t zeros, nonfinite;
    float absmax;
} Moments;

typedef struct {
    double dot, difference;
} Pair;

typedef struct {
    double fourth, within, direction, centred, input;
    int64_t zero, zero_input;
} Rows;

typedef struct {
    double cosine, angle, ratio, change_cosine;
    int64_t zero, zero_next, zero_change;
} PairRows;

#define FUNCTIONS(T, SUFFIX)                                                                            \
    VECTOR static void moments_##SUFFIX(const T *x, size_t n, Moments *out) {                          \
        double sum[LANES] = {0}, squares[LANES] = {0};                                                 \
        int32_t top[LANES] = {0};                                                                      \
        int64_t zeros = 0;                                                                             \
        size_t i = 0;                                                                                  \
        while (i + LANES <= n) {                                                                       \
            size_t stop = n - i > CHUNK ? i + CHUNK : n;                                               \
            int32_t none[LANES] = {0};                                                                 \
            for (; i + LANES <= stop; i += LANES) {                                                    \
                FETCH(x + i);                                                                          \
                for (int k = 0; k < LANES; k++) {                                                      \
                    double value = (double)load_##SUFFIX(x + i + k);                                   \
                    int32_t size = bits_##SUFFIX(x + i + k) & 0x7fffffff;                              \
                    sum[k] += value;                                                                   \
                    squares[k] += value * value;                                                       \
                    top[k] = size > top[k] ? size : top[k];                                            \
                    none[k] += size == 0;                                                              \
                }                                                                                      \
            }                                                                                          \
            for (int k = 0; k < LANES; k++) zeros += none[k];                                          \
        }                                                                                              \
        for (; i < n; i++) {                                                                           \
            double value = (double)load_##SUFFIX(x + i);                                               \
            int32_t size = bits_##SUFFIX(x + i) & 0x7fffffff;                                          \
            sum[0] += value;                                                                           \
            squares[0] += value * value;                                                               \
            top[0] = size > top[0] ? size : top[0];                                                    \
            zeros += size == 0;                                                                        \
        }                                                                                              \
        int32_t most = 0;                                                                              \
        out->sum = out->squares = 0;                                                                   \
        for (int k = 0; k < LANES; k++) {                                                              \
            out->sum += sum[k];                                                                        \
            out->squares += squares[k];                                                                \
            most = top[k] > most ? top[k] : most;                                                      \
        }                                                                                              \
        out->zeros = zeros;                                                                            \
        out->nonfinite = 0;                                                                            \
        memcpy(&out->absmax, &most, sizeof most);                                                      \
        if (most >= INFINITY_BITS)                                                                     \
            for (i = 0; i < n; i++)                                                                    \
                out->nonfinite += (bits_##SUFFIX(x + i) & 0x7fffffff) >= INFINITY_BITS;                \
    }                                                                                                  \
                                                                                                       \
    VECTOR static double squares_##SUFFIX(const T *x, size_t n) {                                      \
        Doubles squares[LANES / 8] = {{0}}, value;                                                     \
        double rest = 0;                                                                               \
        size_t i = 0;                                                                                  \
        for (; i + LANES <= n; i += LANES)                                                             \
            for (int j = 0; j < LANES / 8; j++) {                                                      \
                if (j % 2 == 0) FETCH(x + i + 8 * j);                                                  \
                EIGHT_##SUFFIX(x + i + 8 * j, value);                                                  \
                squares[j] += value * value;                                                           \
            }                                                                                          \
        for (; i < n; i++) rest += (double)load_##SUFFIX(x + i) * (double)load_##SUFFIX(x + i);        \
        return rest + total(squares);                                                                  \
    }                                                                                                  \
                                                                                                       \
    VECTOR static void pair_##SUFFIX(const T *x, const T *y, size_t n, Pair *out) {                    \
        Doubles dot[LANES / 8] = {{0}}, difference[LANES / 8] = {{0}}, a, b;                           \
        size_t i = 0;                                                                                  \
        memset(out, 0, sizeof *out);                                                                   \
        for (; i + LANES <= n; i += LANES)                                                             \
            for (int j = 0; j < LANES / 8; j++) {                                                      \
                if (j % 2 == 0) FETCH(x + i + 8 * j);                                                  \
                if (j % 2 == 0) FETCH(y + i + 8 * j);                                                  \
                EIGHT_##SUFFIX(x + i + 8 * j, a);                                                      \
                EIGHT_##SUFFIX(y + i + 8 * j, b);                                                      \
                dot[j] += a * b;                                                                       \
                difference[j] += (a - b) * (a - b);                                                    \
            }                                                                                          \
        for (; i < n; i++) {                                                                           \
            double first = (double)load_##SUFFIX(x + i), second = (double)load_##SUFFIX(y + i);        \
            out->dot += first * second;                                                                \
            out->difference += (first - second) * (first - second);                                    \
        }                                                                                              \
        out->dot += total(dot);                                                                        \
        out->difference += total(difference);                                                          \
    }                                                                                                  \
                                                                                                       \
    /* One position: sum of squares, fourth powers, and squares about the mean. */                     \
    INLINE double row_##SUFFIX(const T *x, size_t d, double *fourth, double *within) {          \
        Doubles squares[LANES / 8] = {{0}}, fourths[LANES / 8] = {{0}}, sums[LANES / 8] = {{0}}, value, square; \
        double length = 0, power = 0, sum = 0;                                                         \
        size_t i = 0;                                                                                  \
        for (; i + LANES <= d; i += LANES)                                                             \
            for (int j = 0; j < LANES / 8; j++) {                                                      \
                EIGHT_##SUFFIX(x + i + 8 * j, value);                                                  \
                square = value * value;                                                                \
                squares[j] += square;                                                                  \
                fourths[j] += square * square;                                                         \
                sums[j] += value;                                                                      \
            }                                                                                          \
        for (; i < d; i++) {                                                                           \
            double one = (double)load_##SUFFIX(x + i);                                                 \
            length += one * one;                                                                       \
            power += one * one * (one * one);                                                          \
            sum += one;                                                                                \
        }                                                                                              \
        length += total(squares);                                                                      \
        sum += total(sums);                                                                            \
        *fourth += power + total(fourths);                                                             \
        *within += length - sum * sum / (double)d;                                                     \
        return length;                                                                                 \
    }                                                                                                  \
                                                                                                       \
    INLINE double product_##SUFFIX(const T *x, const T *y, size_t d) {                          \
        Doubles lanes[LANES / 8] = {{0}}, a, b;                                                        \
        double rest = 0;                                                                               \
        size_t i = 0;                                                                                  \
        for (; i + LANES <= d; i += LANES)                                                             \
            for (int j = 0; j < LANES / 8; j++) {                                                      \
                EIGHT_##SUFFIX(x + i + 8 * j, a);                                                      \
                EIGHT_##SUFFIX(y + i + 8 * j, b);                                                      \
                lanes[j] += a * b;                                                                     \
            }                                                                                          \
        for (; i < d; i++) rest += (double)load_##SUFFIX(x + i) * (double)load_##SUFFIX(y + i);        \
        return rest + total(lanes);                                                                    \
    }                                                                                                  \
                                                                                                       \
    /* Adds a token to its sequence: its direction, and its difference to the first token. */          \
    INLINE double token_##SUFFIX(const T *x, const T *first, size_t d, double inverse,          \
                                        double *direction, double *sum) {                              \
        Doubles lanes[LANES / 8] = {{0}}, value, less, held;                                           \
        double rest = 0;                                                                               \
        size_t i = 0;                                                                                  \
        for (; i + LANES <= d; i += LANES)                                                             \
            for (int j = 0; j < LANES / 8; j++) {                                                      \
                EIGHT_##SUFFIX(x + i + 8 * j, value);                                                  \
                EIGHT_##SUFFIX(first + i + 8 * j, less);                                               \
                less = value - less;                                                                   \
                memcpy(&held, direction + i + 8 * j, sizeof held);                                     \
                held += value * inverse;                                                               \
                memcpy(direction + i + 8 * j, &held, sizeof held);                                     \
                memcpy(&held, sum + i + 8 * j, sizeof held);                                           \
                held += less;                                                                          \
                memcpy(sum + i + 8 * j, &held, sizeof held);                                           \
                lanes[j] += less * less;                                                               \
            }                                                                                          \
        for (; i < d; i++) {                                                                           \
            double one = (double)load_##SUFFIX(x + i);                                                 \
            double other = one - (double)load_##SUFFIX(first + i);                                     \
            direction[i] += one * inverse;                                                             \
            sum[i] += other;                                                                           \
            rest += other * other;                                                                     \
        }                                                                                              \
        return rest + total(lanes);                                                                    \
    }                                                                                                  \
                                                                                                       \
    /* [sequences, tokens, d]; token t of sequence b is row b * by_sequence + t * by_token. */         \
    VECTOR static void rows_##SUFFIX(const T *x, const T *input, size_t sequences, size_t tokens, size_t d,   \
                              size_t by_sequence, size_t by_token, double *scratch, Rows *out) {       \
        double *direction = scratch, *sum = scratch + d;                                               \
        memset(out, 0, sizeof *out);                                                                   \
        for (size_t b = 0; b < sequences; b++) {                                                       \
            const T *first = x + b * by_sequence * d;                                                  \
            double apart = 0, total = 0, mean = 0;                                                     \
            if (tokens > 1) memset(scratch, 0, 2 * d * sizeof *scratch);                               \
            for (size_t t = 0; t < tokens; t++) {                                                      \
                size_t at = (b * by_sequence + t * by_token) * d;                                      \
                double squares = row_##SUFFIX(x + at, d, &out->fourth, &out->within);                  \
                double length = sqrt(squares);                                                         \
                out->zero += squares == 0;                                                             \
                if (tokens > 1)                                                                        \
                    apart += token_##SUFFIX(x + at, first, d, 1 / length, direction, sum);             \
                if (input) {                                                                           \
                    double own = product_##SUFFIX(input + at, input + at, d);                                      \
                    out->zero_input += own == 0;                                                       \
                    out->input += product_##SUFFIX(x + at, input + at, d) / (length * sqrt(own));      \
                }                                                                                      \
            }                                                                                          \
            if (tokens == 1) continue; /* one alone is its own mean */                                 \
            for (size_t i = 0; i < d; i++) {                                                           \
                total += direction[i] * direction[i];                                                  \
                mean += sum[i] * sum[i];                                                               \
            }                                                                                          \
            out->direction += total;                                                                   \
            out->centred += apart - mean / (double)tokens;                                             \
        }                                                                                              \
    }                                                                                                  \
                                                                                                       \
    /* Sum of the squares of sum_b x[outer, b, inner]. */                                              \
    VECTOR static double together_##SUFFIX(const T *x, size_t outer, size_t samples, size_t inner) {   \
        double total = 0;                                                                              \
        for (size_t o = 0; o < outer; o++) {                                                           \
            const T *start = x + o * samples * inner;                                                  \
            size_t i = 0;                                                                              \
            for (; i + LANES <= inner; i += LANES) {                                                   \
                double sum[LANES] = {0};                                                               \
                for (size_t b = 0; b < samples; b++)                                                   \
                    for (int k = 0; k < LANES; k++)                                                    \
                        sum[k] += (double)load_##SUFFIX(start + b * inner + i + k);                    \
                for (int k = 0; k < LANES; k++) total += sum[k] * sum[k];                              \
            }                                                                                          \
            for (; i < inner; i++) {                                                                   \
                double sum = 0;                                                                        \
                for (size_t b = 0; b < samples; b++) sum += (double)load_##SUFFIX(start + b * inner + i); \
                total += sum * sum;                                                                    \
            }                                                                                          \
        }                                                                                              \
        return total;                                                                                  \
    }                                                                                                  \
                                                                                                       \
    /* |h|^2, |h'|^2, |F|^2, <F, h> of one position, F = h' - h or (a branch) what was given. */       \
    INLINE void change_##SUFFIX(const T *h, const T *y, size_t d, double branch,                \
                                       double out[4]) {                                                \
        Doubles here[LANES / 8] = {{0}}, next[LANES / 8] = {{0}}, change[LANES / 8] = {{0}},           \
                product[LANES / 8] = {{0}}, a, b, f;                                                   \
        double rest[4] = {0}, keep = branch ? 0.0 : 1.0;                                               \
        size_t i = 0;                                                                                  \
        for (; i + LANES <= d; i += LANES)                                                             \
            for (int j = 0; j < LANES / 8; j++) {                                                      \
                EIGHT_##SUFFIX(h + i + 8 * j, a);                                                      \
                EIGHT_##SUFFIX(y + i + 8 * j, b);                                                      \
                f = b - keep * a;                                                                      \
                here[j] += a * a;                                                                      \
                next[j] += b * b;                                                                      \
                change[j] += f * f;                                                                    \
                product[j] += f * a;                                                                   \
            }                                                                                          \
        for (; i < d; i++) {                                                                           \
            double own = (double)load_##SUFFIX(h + i), other = (double)load_##SUFFIX(y + i);           \
            double moved = other - keep * own;                                                         \
            rest[0] += own * own;                                                                      \
            rest[1] += other * other;                                                                  \
            rest[2] += moved * moved;                                                                  \
            rest[3] += moved * own;                                                                    \
        }                                                                                              \
        out[0] = rest[0] + total(here);                                                                \
        out[1] = rest[1] + total(next);                                                                \
        out[2] = rest[2] + total(change);                                                              \
        out[3] = rest[3] + total(product);                                                             \
    }                                                                                                  \
                                                                                                       \
    /* |F - p h|^2 of one position. */                                                                 \
    INLINE double across_##SUFFIX(const T *h, const T *y, size_t d, double keep, double p) {    \
        Doubles lanes[LANES / 8] = {{0}}, a, left;                                                     \
        double rest = 0;                                                                               \
        size_t i = 0;                                                                                  \
        for (; i + LANES <= d; i += LANES)                                                             \
            for (int j = 0; j < LANES / 8; j++) {                                                      \
                EIGHT_##SUFFIX(h + i + 8 * j, a);                                                      \
                EIGHT_##SUFFIX(y + i + 8 * j, left);                                                   \
                left = left - keep * a - p * a;                                                        \
                lanes[j] += left * left;                                                               \
            }                                                                                          \
        for (; i < d; i++) {                                                                           \
            double own = (double)load_##SUFFIX(h + i);                                                 \
            double one = (double)load_##SUFFIX(y + i) - keep * own - p * own;                          \
            rest += one * one;                                                                         \
        }                                                                                              \
        return rest + total(lanes);                                                                    \
    }                                                                                                  \
                                                                                                       \
    VECTOR static void pair_rows_##SUFFIX(const T *h, const T *y, size_t rows, size_t d, int branch,          \
                                   PairRows *out) {                                                    \
        memset(out, 0, sizeof *out);                                                                   \
        for (size_t r = 0; r < rows; r++) {                                                            \
            double found[4];                                                                           \
            change_##SUFFIX(h + r * d, y + r * d, d, branch, found);                                   \
            double length = sqrt(found[0]), change = sqrt(found[2]);                                   \
            out->zero += found[0] == 0;                                                                \
            out->zero_next += found[1] == 0;                                                           \
            out->zero_change += found[2] == 0;                                                         \
            out->ratio += change / length;                                                             \
            out->change_cosine += found[3] / (length * change);                                        \
            if (!branch) {                                                                             \
                /* What is added across h and along it: a small angle keeps its digits. */             \
                double p = found[3] / found[0];                                                        \
                double across = sqrt(across_##SUFFIX(h + r * d, y + r * d, d, 1.0, p));                \
                double angle = atan2(across, length * (1 + p));                                        \
                out->angle += angle;                                                                   \
                out->cosine += cos(angle);                                                             \
            }                                                                                          \
        }                                                                                              \
    }

FUNCTIONS(float, f32)
FUNCTIONS(bf16, bf16)
