// Which experts a row goes to: softmax over all, the largest ones, their shares.
#pragma once

#include <algorithm>
#include <limits>

#include "products.h"

namespace {

// `score`: [n] becomes the probabilities. `missing`: [n] or null: such an expert is chosen last, and
// weighs nothing. The first of equals is taken. NaN anywhere makes all weights NaN.
template <typename Out>
void choose(float* score, const bool* missing, i64 n, i64 choices, bool normalise, Out* weights, i64* ids) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  const i64 padded = (n + W - 1) / W * W;
  for (i64 e = 0; e < n; e++)
    if (missing && missing[e]) score[e] = none;
  std::fill(score + n, score + padded, none);
  float largest = none;
  for (i64 e = 0; e < n; e++) largest = score[e] > largest || score[e] != score[e] ? score[e] : largest;
  if (largest == none) largest = 0.0f;  // all are missing
  float total = 0.0f;
  for (i64 e = 0; e < padded; e += W) store(score + e, vexp(add(load(score + e), set1(-largest))));
  for (i64 e = 0; e < n; e++) total += score[e];
  float sum = 0.0f;
  float picked[64];
  for (i64 c = 0; c < choices; c++) {
    i64 best = -1;
    float found = -2.0f;
    for (i64 e = 0; e < n; e++) {
      const float p = missing && missing[e] ? -1.0f : score[e];
      if (best < 0 || p > found) {
        bool taken = false;
        for (i64 before = 0; before < c; before++) taken |= ids[before] == e;
        if (!taken) best = e, found = p;
      }
    }
    ids[c] = best;
    picked[c] = missing && missing[best] ? 0.0f : score[best] / total;
    sum += picked[c];
  }
  if (sum < std::numeric_limits<float>::min()) sum = std::numeric_limits<float>::min();
  for (i64 c = 0; c < choices; c++) narrow(normalise ? picked[c] / sum : picked[c], weights + c);
}

template <typename T, typename Out>
void route_rows(const T* x, i64 ldx, const T* w, const bool* missing, i64 m, i64 n, i64 k, i64 choices, bool normalise,
                T* logits, Out* weights, i64* ids, int threads) {
  const Linear<T> layer{w, nullptr, logits, n};
  linears(x, ldx, &layer, 1, m, k, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && m > 16)
  for (i64 r = 0; r < m; r++) {
    static thread_local std::vector<float> buffer;
    float* score = scratch(buffer, n + W);
    for (i64 e = 0; e < n; e++) score[e] = widen(logits[r * n + e]);
    choose(score, missing, n, choices, normalise, weights + r * choices, ids + r * choices);
  }
}

}  // namespace
