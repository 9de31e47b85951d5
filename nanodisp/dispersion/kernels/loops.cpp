// The loops of loops.py, each in one pass over memory. compiled.py compiles this file and calls the functions at its end.
//
// Every thread writes its own elements, and sums are in a fixed order: the same input gives the same bits for any number
// of threads.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bfloat16 {
    uint16_t bits;
};

float widen(float x) { return x; }

float widen(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

template <class To> To narrow(float x);

template <> float narrow(float x) { return x; }

template <> bfloat16 narrow(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// 2^x for |x| < 126: the Taylor series within half an octave, relative error 2e-7, and the integer part as exponent.
float power_of_two(float x) {
    const float octave = std::nearbyint(x), y = (x - octave) * 0.69314718056f;
    const float series = 1 + y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6)))));
    const int32_t bits = (int32_t(octave) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return scale * series;
}

enum Variant { ANGULAR, ORTHOGONALIZATION, COSINE };

// w and h / h_edge of a cosine, with the coefficients of loops.py's `polynomial`.
template <Variant variant, int DEGREE>
void pair(float c, const float* coefficients, float lowest, float highest, float inverse_edge, float& w, float& h) {
    if (variant == COSINE) {
        w = h = power_of_two(coefficients[0] * c);
        return;
    }
    float clamped = c < lowest ? lowest : c;
    clamped = clamped > highest ? highest : clamped;
    const float squared = clamped * clamped;
    float s = coefficients[DEGREE];
    for (int k = DEGREE - 1; k >= 0; k--) s = s * squared + coefficients[k];
    s *= clamped;
    const float base = variant == ANGULAR ? power_of_two(s) : s;
    w = variant == ANGULAR ? base : s * s;
    h = base * inverse_edge / std::sqrt(1 - squared);
}

// SIDE, given by compiled.py: of a tile, whose h stay in the first-level cache until they are written twice.

// One tile on or above the diagonal, rows from i0 and columns from j0: writes h, mirrored too, and sums of w and of
// h c over its rows (and over its columns, which are the rows of its mirror image).
template <Variant variant, int DEGREE, class C, class H>
void tile(const C* cosines, H* h, float* sums_w, float* sums_hc, int64_t n_tokens, int64_t i0, int64_t j0,
          const float* coefficients, float lowest, float highest, float inverse_edge) {
    const int rows = n_tokens - i0 < SIDE ? n_tokens - i0 : SIDE;
    const int columns = n_tokens - j0 < SIDE ? n_tokens - j0 : SIDE;
    float tile[SIDE][SIDE], columns_w[SIDE] = {}, columns_hc[SIDE] = {};
    for (int i = 0; i < rows; i++) {
        const int itself = i0 == j0 ? i : -1;
        float row_w = 0, row_hc = 0;
        for (int j = 0; j < columns; j++) {
            const float c = widen(cosines[(i0 + i) * n_tokens + j0 + j]);
            float w, slope;
            pair<variant, DEGREE>(c, coefficients, lowest, highest, inverse_edge, w, slope);
            w = j == itself ? 0 : w;
            slope = j == itself ? 0 : slope;
            tile[i][j] = slope;
            row_w += w;
            row_hc += slope * c;
            columns_w[j] += w;
            columns_hc[j] += slope * c;
        }
        sums_w[j0 / SIDE * n_tokens + i0 + i] = row_w;
        sums_hc[j0 / SIDE * n_tokens + i0 + i] = row_hc;
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) h[(i0 + i) * n_tokens + j0 + j] = narrow<H>(tile[i][j]);
    if (i0 == j0) return;
    for (int j = 0; j < columns; j++) {
        sums_w[i0 / SIDE * n_tokens + j0 + j] = columns_w[j];
        sums_hc[i0 / SIDE * n_tokens + j0 + j] = columns_hc[j];
        for (int i = 0; i < rows; i++) h[(j0 + j) * n_tokens + i0 + i] = narrow<H>(tile[i][j]);
    }
}

template <Variant variant, int DEGREE, class C, class H>
void all_tiles(const C* cosines, H* h, float* sums, int64_t n, int64_t n_tokens, const float* coefficients,
               float lowest, float highest, float inverse_edge, int64_t threads) {
    const int64_t tiles = (n_tokens + SIDE - 1) / SIDE, size = n_tokens * n_tokens;
#pragma omp parallel for collapse(3) schedule(dynamic, 4) num_threads(threads)
    for (int64_t b = 0; b < n; b++)
        for (int64_t i = 0; i < tiles; i++)
            for (int64_t j = 0; j < tiles; j++)
                if (i <= j)
                    tile<variant, DEGREE>(cosines + b * size, h + b * size, sums + b * tiles * n_tokens,
                                  sums + (n + b) * tiles * n_tokens, n_tokens, i * SIDE, j * SIDE, coefficients, lowest,
                                  highest, inverse_edge);
}

template <class C, class H>
void all_pairs(Variant variant, const void* cosines, void* h, float* sums, int64_t n, int64_t n_tokens,
               const float* coefficients, int64_t n_coefficients, float lowest, float highest, float inverse_edge,
               int64_t threads) {
    const bool is_long = n_coefficients == 12;  // else 8, as pairwise.py's `arcsin_coefficients` has them
    const auto angular = is_long ? all_tiles<ANGULAR, 11, C, H> : all_tiles<ANGULAR, 7, C, H>;
    const auto orthogonalization = is_long ? all_tiles<ORTHOGONALIZATION, 11, C, H> : all_tiles<ORTHOGONALIZATION, 7, C, H>;
    const auto run = variant == ANGULAR ? angular : variant == COSINE ? all_tiles<COSINE, 0, C, H> : orthogonalization;
    run((const C*)cosines, (H*)h, sums, n, n_tokens, coefficients, lowest, highest, inverse_edge, threads);
}

template <class U>
void all_directions(const float* z, U* u, float* norms, int64_t rows, int64_t n_features, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        float squared = 0;
        for (int64_t f = 0; f < n_features; f++) squared += z[i * n_features + f] * z[i * n_features + f];
        norms[i] = std::sqrt(squared);
        const float inverse = 1 / (norms[i] + eps);
        for (int64_t f = 0; f < n_features; f++) u[i * n_features + f] = narrow<U>(z[i * n_features + f] * inverse);
    }
}

}  // namespace

extern "C" {

// Each is described where compiled.py's function of the same name is, in loops.py.

void directions(const float* z, void* u, int64_t u_is_bfloat16, float* norms, int64_t rows, int64_t n_features,
                float eps, int64_t threads) {
    if (u_is_bfloat16)
        all_directions(z, (bfloat16*)u, norms, rows, n_features, eps, threads);
    else
        all_directions(z, (float*)u, norms, rows, n_features, eps, threads);
}

// sums [2, n, tiles, n_tokens]: of w and of h c over the columns of each tile.
void pairs(int64_t variant, const void* cosines, int64_t cosines_are_bfloat16, void* h, int64_t h_is_bfloat16,
           float* sums, int64_t n, int64_t n_tokens, const float* coefficients, int64_t n_coefficients, float lowest,
           float highest, float inverse_edge, int64_t threads) {
    const auto run = !h_is_bfloat16         ? all_pairs<float, float>
                     : cosines_are_bfloat16 ? all_pairs<bfloat16, bfloat16>
                                            : all_pairs<float, bfloat16>;
    run(Variant(variant), cosines, h, sums, n, n_tokens, coefficients, n_coefficients, lowest, highest,
        inverse_edge, threads);
}

void unround(const bfloat16* product, const float* z, const float* norms, const float* rounded, const float* exact,
             const float* scale, float* result, int64_t rows, int64_t n_features, float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const float inverse = 1 / (norms[i] + eps);
        for (int64_t f = i * n_features; f < (i + 1) * n_features; f++) {
            const float u = z[f] * inverse, lost = exact[i] * u - rounded[i] * widen(narrow<bfloat16>(u));
            result[f] = scale[i] * (widen(product[f]) + lost);
        }
    }
}

}  // extern "C"
