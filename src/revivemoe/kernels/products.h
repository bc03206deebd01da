// Rows times weights: packing, tiles, and the linear layer.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

// ---- rows as the products take them ---------------------------------------------------------

template <typename Weight>
struct PackedOf {
  using type = float;
};
template <>
struct PackedOf<bf16> {
  using type = std::conditional_t<PAIRS, bf16, float>;
};
// An element of a row that meets such weights.
template <typename Weight>
using Packed = typename PackedOf<Weight>::type;

// Where element i of a block of halves lies once they are widened.
inline i64 widened_at(i64 i) {
  const i64 r = i % BLOCK;
  return i - r + (r & 1) * W + r / 2;
}

// Where element i of a row lies in its packed form.
template <typename Weight>
inline i64 packed_at(i64 i) {
  return sizeof(Weight) == 4 || PAIRS ? i : widened_at(i);
}

template <typename Weight>
void pack(const bf16* row, i64 k, Packed<Weight>* to) {
  if constexpr (sizeof(Weight) == 4) {
    for (i64 i = 0; i < k; i++) to[i] = widen(row[i]);
  } else if constexpr (PAIRS) {
    std::memcpy(to, row, k * sizeof(bf16));
  } else {
    for (i64 i = 0; i < k; i += BLOCK) {
      vf even, odd;
      load_halves(row + i, even, odd);
      store(to + i, even);
      store(to + i + W, odd);
    }
  }
}

template <typename Weight>
void pack(const float* row, i64 k, Packed<Weight>* to) {
  if constexpr (sizeof(Weight) == 4) {
    std::memcpy(to, row, k * sizeof(float));
  } else {
    for (i64 i = 0; i < k; i++) narrow(row[i], to + packed_at<Weight>(i));
  }
}

// ---- tiles: MR rows against NR rows of weights ----------------------------------------------

// Ask for what comes next: rows of weights end before the processor has seen that it reads on.
template <typename T>
inline void ahead(const T* next, i64 first, i64 count) {
  const char* at = (const char*)(next + first);
  for (i64 i = 0; i < count * (i64)sizeof(T); i += 64) _mm_prefetch(at + i, _MM_HINT_T0);
}

template <int MR, int NR>
inline void write_sums(const vf (&acc)[MR][NR], float* out, i64 ldo) {
  for (int m = 0; m < MR; m++) {
    if constexpr (NR == TILE_N) {
      sums(acc[m], out + m * ldo);
    } else {
      for (int n = 0; n < NR; n++) out[m * ldo + n] = sum(acc[m][n]);
    }
  }
}

#if defined(__AVX512BF16__)
template <int MR, int NR>
inline void tile(const bf16* const* x, const bf16* w, i64 ldw, i64 k, float* out, i64 ldo) {
  vf acc[MR][NR];
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < NR; n++) acc[m][n] = zero();
  for (i64 i = 0; i < k; i += BLOCK) {
    vh b[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; n++) b[n] = load_pairs(w + n * ldw + i);
    ahead(w + NR * ldw, NR * i, NR * BLOCK);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const vh a = load_pairs(x[m] + i);
#pragma GCC unroll 4
      for (int n = 0; n < NR; n++) acc[m][n] = add_pairs(acc[m][n], a, b[n]);
    }
  }
  write_sums<MR, NR>(acc, out, ldo);
}
#endif

template <int MR, int NR>
inline void tile(const float* const* x, const bf16* w, i64 ldw, i64 k, float* out, i64 ldo) {
  vf acc[MR][NR];
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < NR; n++) acc[m][n] = zero();
  for (i64 i = 0; i < k; i += BLOCK) {
    vf even[NR], odd[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; n++) load_halves(w + n * ldw + i, even[n], odd[n]);
    ahead(w + NR * ldw, NR * i, NR * BLOCK);
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) {
      const vf a = load(x[m] + i), b = load(x[m] + i + W);
#pragma GCC unroll 4
      for (int n = 0; n < NR; n++) acc[m][n] = fma(b, odd[n], fma(a, even[n], acc[m][n]));
    }
  }
  write_sums<MR, NR>(acc, out, ldo);
}

template <int MR, int NR>
inline void tile(const float* const* x, const float* w, i64 ldw, i64 k, float* out, i64 ldo) {
  vf acc[MR][NR];
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < NR; n++) acc[m][n] = zero();
  for (i64 i = 0; i < k; i += W) {
    vf b[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; n++) b[n] = load(w + n * ldw + i);
    ahead(w + NR * ldw, NR * i, NR * W);
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) {
      const vf a = load(x[m] + i);
#pragma GCC unroll 4
      for (int n = 0; n < NR; n++) acc[m][n] = fma(a, b[n], acc[m][n]);
    }
  }
  write_sums<MR, NR>(acc, out, ldo);
}

template <int NR, typename Weight>
void rows_of_tile(const Packed<Weight>* const* x, i64 m, const Weight* w, i64 ldw, i64 k, float* out, i64 ldo) {
  i64 at = 0;
  constexpr i64 MOST = sizeof(Weight) == 2 && PAIRS ? 6 : TILE_M;
  for (; at + MOST <= m; at += MOST) tile<MOST, NR>(x + at, w, ldw, k, out + at * ldo, ldo);
  switch (m - at) {
    case 5: tile<5, NR>(x + at, w, ldw, k, out + at * ldo, ldo); break;
    case 4: tile<4, NR>(x + at, w, ldw, k, out + at * ldo, ldo); break;
    case 3: tile<3, NR>(x + at, w, ldw, k, out + at * ldo, ldo); break;
    case 2: tile<2, NR>(x + at, w, ldw, k, out + at * ldo, ldo); break;
    case 1: tile<1, NR>(x + at, w, ldw, k, out + at * ldo, ldo); break;
    default: break;
  }
}

// out[m, n] = x[m] . w[n] for n rows of weights, `out` with `ldo` elements a row.
template <typename Weight>
void products(const Packed<Weight>* const* x, i64 m, const Weight* w, i64 ldw, i64 n, i64 k, float* out, i64 ldo) {
  i64 at = 0;
  for (; at + TILE_N <= n; at += TILE_N)
    rows_of_tile<TILE_N>(x, m, w + at * ldw, ldw, k, out + at, ldo);
  for (; at < n; at++) rows_of_tile<1>(x, m, w + at * ldw, ldw, k, out + at, ldo);
}

template <typename T>
constexpr i64 STEP = sizeof(T) == 2 ? BLOCK : W;  // elements of a row that are taken at once

inline i64 up_to(i64 size, i64 step) { return (size + step - 1) / step * step; }

// `to` has room for `k` rounded up to STEP.
template <typename Weight, typename X>
void pack_padded(const X* row, i64 k, Packed<Weight>* to) {
  const i64 whole = k / STEP<Weight> * STEP<Weight>;
  pack<Weight>(row, whole, to);
  if (whole == k) return;
  std::fill(to + whole, to + whole + STEP<Weight>, Packed<Weight>(0));
  for (i64 i = whole; i < k; i++) narrow(widen(row[i]), to + packed_at<Weight>(i));
}

// Products with rows of any length: what is not a multiple of STEP is copied and padded with zeros.
template <typename T>
void products_padded(const Packed<T>* const* x, i64 m, const T* w, i64 ldw, i64 n, i64 k, float* out, i64 ldo) {
  if (k % STEP<T> == 0) return products(x, m, w, ldw, n, k, out, ldo);
  static thread_local std::vector<T> buffer;
  const i64 padded = up_to(k, STEP<T>);
  T* rows = scratch(buffer, n * padded);
  for (i64 i = 0; i < n; i++) {
    std::memcpy(rows + i * padded, w + i * ldw, k * sizeof(T));
    std::memset(static_cast<void*>(rows + i * padded + k), 0, (padded - k) * sizeof(T));
  }
  products(x, m, rows, padded, n, padded, out, ldo);
}

constexpr i64 ROWS = 32;   // rows that are worked on while weights are in the first cache
constexpr i64 COLS = 64;   // outputs of one piece of work

// ---- linear ---------------------------------------------------------------------------------

template <typename T>
inline void write_linear(const float* sums, const T* bias, i64 count, T* to) {
  const i64 whole = count / W * W;
  for (i64 i = 0; i < whole; i += W)
    narrow_all(add(load(sums + i), bias ? widen_all(bias + i) : zero()), to + i);
  for (i64 i = whole; i < count; i++) narrow(sums[i] + (bias ? widen(bias[i]) : 0.0f), to + i);
}

template <typename T>
struct Linear {
  const T* w;
  const T* bias;
  T* y;
  i64 n;

  i64 pieces() const { return (n + COLS - 1) / COLS; }
};

// Several layers of the same rows, [m, k].
template <typename T>
void linears(const T* x, i64 ldx, const Linear<T>* layers, i64 num_layers, i64 m, i64 k, int threads) {
  static thread_local std::vector<Packed<T>> packed_buffer;
  static thread_local std::vector<const Packed<T>*> rows_buffer;
  const i64 padded = up_to(k, STEP<T>);
  Packed<T>* packed = scratch(packed_buffer, m * padded);
  const Packed<T>** rows = scratch(rows_buffer, m);
  i64 pieces = 0;
  for (i64 i = 0; i < num_layers; i++) pieces += layers[i].pieces();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (i64 r = 0; r < m; r++) {
      pack_padded<T>(x + r * ldx, k, packed + r * padded);
      rows[r] = packed + r * padded;
    }
#pragma omp for schedule(static)
    for (i64 piece = 0; piece < pieces; piece++) {
      float out[ROWS * COLS];
      const Linear<T>* to = layers;
      i64 of_layer = piece;
      for (; of_layer >= to->pieces(); to++) of_layer -= to->pieces();
      const i64 first = of_layer * COLS, count = std::min(COLS, to->n - first);
      for (i64 r = 0; r < m; r += ROWS) {
        const i64 num = std::min(ROWS, m - r);
        products_padded(rows + r, num, to->w + first * k, k, count, k, out, COLS);
        for (i64 i = 0; i < num; i++)
          write_linear(out + i * COLS, to->bias ? to->bias + first : nullptr, count, to->y + (r + i) * to->n + first);
      }
    }
  }
}

}  // namespace
