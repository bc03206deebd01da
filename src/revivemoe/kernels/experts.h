// The experts of a layer for some rows: gate and up, silu, down, and the weighted sum.
#pragma once

#include <cmath>

#include "products.h"

namespace {

// silu(gate) * up, rounded as weights are, into the packed form.
template <typename Weight>
void gated(const float* gate, const float* up, i64 count, i64 first, Packed<Weight>* to) {
  float h[COLS];
  for (i64 i = 0; i < COLS; i += W) {
    const vf g = load(gate + i);
    const vf e = vexp(mul(g, set1(-1.0f)));
    store(h + i, mul(div(g, add(e, set1(1.0f))), load(up + i)));
  }
  for (i64 i = 0; i < count; i++) 
    narrow(rounded(h[i], (const Weight*)nullptr), to + packed_at<Weight>(first + i));
}

// A multiple of 2^-36: sums of such numbers are exact in a double up to 2^17, in any order.
inline double grain(float value) {
  const double big = 6755399441055744.0 / 68719476736.0;  // 1.5 * 2^52 * 2^-36
  volatile double shifted = static_cast<double>(value) + big;
  return std::fabs(value) < 65536.0f ? shifted - big : static_cast<double>(value);
}

template <typename X, typename Weight, typename Out>
void experts(const X* x, const i64* slots, const float* weights, const Weight* gate_up, const Weight* down,
             Out* out, i64 num_rows, i64 choices, i64 num_slots, i64 hidden, i64 inner, int threads) {
  static thread_local std::vector<Packed<Weight>> packed_buffer, inner_buffer;
  static thread_local std::vector<float> out_buffer;
  static thread_local std::vector<i64> start_buffer, pair_of_buffer, next_buffer;
  static thread_local std::vector<const Packed<Weight>*> x_buffer, h_buffer;
  i64* start = scratch(start_buffer, num_slots + 1);
  i64* next = scratch(next_buffer, num_slots + 1);
  i64* pair_of = scratch(pair_of_buffer, num_rows * choices);  // of a row's choice; -1: not here
  std::fill(start, start + num_slots + 1, 0);
  for (i64 i = 0; i < num_rows * choices; i++)
    if (slots[i] >= 0 && slots[i] < num_slots) start[slots[i] + 1]++;
  for (i64 s = 0; s < num_slots; s++) start[s + 1] += start[s];
  std::copy(start, start + num_slots, next);
  const i64 pairs = start[num_slots];
  Packed<Weight>* packed = scratch(packed_buffer, num_rows * hidden);
  Packed<Weight>* h = scratch(inner_buffer, pairs * inner);
  float* y = scratch(out_buffer, pairs * hidden);
  const Packed<Weight>** x_of = scratch(x_buffer, pairs);
  const Packed<Weight>** h_of = scratch(h_buffer, pairs);
  for (i64 i = 0; i < num_rows * choices; i++) {
    pair_of[i] = -1;
    if (slots[i] < 0 || slots[i] >= num_slots) continue;
    const i64 p = next[slots[i]]++;
    pair_of[i] = p;
    x_of[p] = packed + i / choices * hidden;
    h_of[p] = h + p * inner;
  }
  const i64 of_inner = (inner + COLS - 1) / COLS, of_hidden = (hidden + COLS - 1) / COLS;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (i64 r = 0; r < num_rows; r++) pack<Weight>(x + r * hidden, hidden, packed + r * hidden);
#pragma omp for schedule(dynamic, 1)
    for (i64 piece = 0; piece < num_slots * of_inner; piece++) {
      const i64 slot = piece / of_inner, first = piece % of_inner * COLS, count = std::min(COLS, inner - first);
      const Weight* gate = gate_up + (slot * 2 * inner + first) * hidden;
      float g[ROWS * COLS], u[ROWS * COLS];
      for (i64 p = start[slot]; p < start[slot + 1]; p += ROWS) {
        const i64 num = std::min(ROWS, start[slot + 1] - p);
        products(x_of + p, num, gate, hidden, count, hidden, g, COLS);
        products(x_of + p, num, gate + inner * hidden, hidden, count, hidden, u, COLS);
        for (i64 i = 0; i < num; i++) gated<Weight>(g + i * COLS, u + i * COLS, count, first, h + (p + i) * inner);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (i64 piece = 0; piece < num_slots * of_hidden; piece++) {
      const i64 slot = piece / of_hidden, first = piece % of_hidden * COLS, count = std::min(COLS, hidden - first);
      for (i64 p = start[slot]; p < start[slot + 1]; p += ROWS) {
        const i64 num = std::min(ROWS, start[slot + 1] - p);
        const Weight* rows = down + (slot * hidden + first) * inner;
        products(h_of + p, num, rows, inner, count, inner, y + p * hidden + first, hidden);
      }
    }
#pragma omp for schedule(static)
    for (i64 r = 0; r < num_rows; r++) {
      Out* to = out + r * hidden;
      std::fill(to, to + hidden, Out(0));
      for (i64 c = 0; c < choices; c++) {
        const i64 p = pair_of[r * choices + c];
        if (p < 0) continue;
        const float weight = weights[r * choices + c];
        const float* from = y + p * hidden;
        for (i64 i = 0; i < hidden; i++) {
          if constexpr (sizeof(Out) == 8) {
            to[i] += grain(weight * from[i]);
          } else {
            to[i] += weight * from[i];
          }
        }
      }
    }
  }
}

}  // namespace
