// Attention of single queries over pages of keys and values.
#pragma once

#include <limits>

#include "products.h"

namespace {

struct Attention {
  i64 queries;         // rows of q that attend
  i64 heads, kv_heads, dim, dim_v, block_size;
  i64 q_row, q_head;   // strides of q, in elements; its last dimension is contiguous
  i64 table_width;     // of `tables`, [queries, table_width], or 0: position j lies at row j
  i64 window;          // 0: none
  float scale;
};

// Scores of G heads of one query against the positions [first, last), each head's on end.
template <typename T>
void scores(const Attention& a, const Packed<T>* const* q, i64 heads, const T* keys, const i64* table, i64 first,
            i64 last, i64 kv_head, float* to, i64 stride) {
  const i64 position = a.kv_heads * a.dim;
  for (i64 j = first; j < last;) {
    const i64 in_block = table ? j % a.block_size : 0;
    const i64 count = table ? std::min(last - j, a.block_size - in_block) : last - j;
    const i64 at = table ? table[j / a.block_size] * a.block_size + in_block : j;
    const T* from = keys + at * position + kv_head * a.dim;
    products_padded(q, heads, from, position, count, a.dim, to + (j - first), stride);
    j += count;
  }
}

template <typename T>
inline void add_values(const T* v, const float* p, i64 heads, i64 stride, vf (*acc)[2]) {
  vf even, odd;
  if constexpr (sizeof(T) == 2) {
    load_halves(v, even, odd);
  } else {
    even = load(v);
    odd = load(v + W);
  }
  for (i64 g = 0; g < heads; g++) {
    const vf weight = set1(p[g * stride]);
    acc[g][0] = fma(weight, even, acc[g][0]);
    acc[g][1] = fma(weight, odd, acc[g][1]);
  }
}

constexpr i64 HEADS = 4;

// Sum over positions of weight times value, for at most HEADS heads and BLOCK dimensions.
template <typename T>
void weigh(const Attention& a, const float* p, i64 heads, i64 stride, const T* values, const i64* table, i64 first,
           i64 last, i64 kv_head, i64 d, const float* over, T* const* to) {
  vf acc[HEADS][2];
  for (i64 g = 0; g < HEADS; g++) acc[g][0] = acc[g][1] = zero();
  const i64 position = a.kv_heads * a.dim_v, count = std::min<i64>(BLOCK, a.dim_v - d);
  T padded[BLOCK] = {};
  for (i64 j = first; j < last; j++) {
    const i64 at = table ? table[j / a.block_size] * a.block_size + j % a.block_size : j;
    const T* v = values + at * position + kv_head * a.dim_v + d;
    if (count < BLOCK) {
      std::memcpy(padded, v, count * sizeof(T));
      v = padded;
    }
    switch (heads) {
      case 4: add_values(v, p + (j - first), 4, stride, acc); break;
      case 3: add_values(v, p + (j - first), 3, stride, acc); break;
      case 2: add_values(v, p + (j - first), 2, stride, acc); break;
      default: add_values(v, p + (j - first), 1, stride, acc); break;
    }
  }
  for (i64 g = 0; g < heads; g++) {
    float out[BLOCK];
    store(out, mul(acc[g][0], set1(over[g])));
    store(out + W, mul(acc[g][1], set1(over[g])));
    for (i64 i = 0; i < count; i++) narrow(out[sizeof(T) == 2 ? widened_at(i) : i], to[g] + d + i);
  }
}

// One over the sum of exp(score - largest); scores become exp(score - largest). [n], padded to W.
inline float soften(float* s, i64 n, const float* sink) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  vf top = set1(none);
  const i64 padded = (n + W - 1) / W * W;
  std::fill(s + n, s + padded, none);
  for (i64 i = 0; i < padded; i += W) top = vmax(load(s + i), top);
  float lanes[W];
  store(lanes, top);
  float largest = sink ? *sink : none;
  for (int i = 0; i < W; i++) largest = lanes[i] > largest ? lanes[i] : largest;
  vf total = zero();
  for (i64 i = 0; i < padded; i += W) {
    const vf e = vexp(add(load(s + i), set1(-largest)));
    store(s + i, e);
    total = add(total, e);
  }
  std::fill(s + n, s + padded, 0.0f);
  float all = sum(total);
  if (sink) {
    float one[W] = {*sink - largest};
    store(one, vexp(load(one)));
    all += one[0];
  }
  return 1.0f / all;
}

template <typename T>
void attention(const Attention& a, const T* q, const T* keys, const T* values, const i64* rows, const i64* tables,
               const i64* lengths, const float* sinks, T* out, int threads) {
  const i64 group = a.heads / a.kv_heads, parts = (group + HEADS - 1) / HEADS;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (i64 item = 0; item < a.queries * a.kv_heads * parts; item++) {
    static thread_local std::vector<float> score_buffer;
    static thread_local std::vector<Packed<T>> q_buffer;
    const i64 query = item / (a.kv_heads * parts), kv_head = item / parts % a.kv_heads, part = item % parts;
    const i64 head = kv_head * group + part * HEADS, heads = std::min(HEADS, group - part * HEADS);
    const i64 last = lengths[query], first = a.window ? std::max<i64>(0, last - a.window) : 0;
    const i64 stride = (last - first + W - 1) / W * W;
    float* p = scratch(score_buffer, HEADS * stride);
    const i64 dim = up_to(a.dim, STEP<T>);
    Packed<T>* packed = scratch(q_buffer, HEADS * dim);
    const Packed<T>* q_of[HEADS];
    T* to[HEADS];
    float over[HEADS];
    for (i64 g = 0; g < heads; g++) {
      pack_padded<T>(q + rows[query] * a.q_row + (head + g) * a.q_head, a.dim, packed + g * dim);
      q_of[g] = packed + g * dim;
      to[g] = out + (rows[query] * a.heads + head + g) * a.dim_v;
    }
    const i64* table = a.table_width ? tables + query * a.table_width : nullptr;
    scores(a, q_of, heads, keys, table, first, last, kv_head, p, stride);
    for (i64 g = 0; g < heads; g++) {
      float* s = p + g * stride;
      for (i64 j = 0; j < last - first; j++) s[j] *= a.scale;
      over[g] = soften(s, last - first, sinks ? sinks + head + g : nullptr);
    }
    for (i64 d = 0; d < a.dim_v; d += BLOCK)
      weigh(a, p, heads, stride, values, table, first, last, kv_head, d, over, to);
  }
}

}  // namespace
