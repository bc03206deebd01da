// Queries, keys and values of rows, as attention takes them; keys and values go into the pages.
#pragma once

#include "norms.h"
#include "products.h"

namespace {

template <typename T>
struct Heads {
  const T* norm;  // [dim], of each head; or null
  float eps;
  i64 count, dim;
};

// One head turned by the angles of its position: x * cos + rotated(x) * sin, each step rounded to T,
// where rotated has the second half, with the other sign, before the first.
template <typename T>
void turn(const T* x, const T* cos, const T* sin, i64 dim, T* to) {
  const i64 half = dim / 2;
  const vf minus = set1(-1.0f);
  i64 i = 0;
  for (; i + W <= half; i += W) {
    const vf a = widen_all(x + i), b = widen_all(x + half + i);
    const vf first = rounded(mul(a, widen_all(cos + i)), to);
    const vf second = rounded(mul(b, widen_all(cos + half + i)), to);
    narrow_all(add(first, rounded(mul(mul(b, minus), widen_all(sin + i)), to)), to + i);
    narrow_all(add(second, rounded(mul(a, widen_all(sin + half + i)), to)), to + half + i);
  }
  for (; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[half + i]);
    const float first = rounded(a * widen(cos[i]), to), second = rounded(b * widen(cos[half + i]), to);
    narrow(first + rounded(-b * widen(sin[i]), to), to + i);
    narrow(second + rounded(a * widen(sin[half + i]), to), to + half + i);
  }
}

template <typename T>
void turn_heads(const Heads<T>& heads, const T* x, const T* cos, const T* sin, T* to) {
  static thread_local std::vector<T> buffer;
  T* normed = scratch(buffer, heads.dim);
  for (i64 h = 0; h < heads.count; h++, x += heads.dim, to += heads.dim) {
    if (heads.norm) rms_norm(x, heads.dim, heads.norm, normed, 1, heads.dim, heads.eps);
    turn(heads.norm ? normed : x, cos, sin, heads.dim, to);
  }
}

// `layers`: of queries, keys and values; what they write to is not looked at. `cos`, `sin`: [m, dim].
// Queries go to `query`, [m, heads, dim]; keys and values of row r into slot `slots[r]` of the pages.
template <typename T>
void project(const T* x, Linear<T>* layers, const Heads<T>& queries, const Heads<T>& keys, i64 value_size,
             const T* cos, const T* sin, const i64* slots, T* query, T* key_pages, T* value_pages, i64 m, i64 k,
             int threads) {
  static thread_local std::vector<T> buffer;
  const i64 query_size = queries.count * queries.dim, key_size = keys.count * keys.dim;
  T* raw = scratch(buffer, m * (query_size + key_size + value_size));
  layers[0].y = raw;
  layers[1].y = raw + m * query_size;
  layers[2].y = raw + m * (query_size + key_size);
  linears(x, k, layers, 3, m, k, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && m > 4)
  for (i64 r = 0; r < m; r++) {
    const T *c = cos + r * queries.dim, *s = sin + r * queries.dim;
    turn_heads(queries, layers[0].y + r * query_size, c, s, query + r * query_size);
    turn_heads(keys, layers[1].y + r * key_size, c, s, key_pages + slots[r] * key_size);
    std::memcpy(value_pages + slots[r] * value_size, layers[2].y + r * value_size, value_size * sizeof(T));
  }
}

}  // namespace
