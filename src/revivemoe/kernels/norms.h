// Root mean square normalisation, as `transformers` rounds it.
#pragma once

#include <cmath>

#include "vectors.h"

namespace {

// y = weight * (x / sqrt(mean(x^2) + eps)), the quotient and the product each rounded to T.
template <typename T>
void rms_norm(const T* x, i64 stride, const T* weight, T* y, i64 rows, i64 size, float eps) {
  for (i64 r = 0; r < rows; r++, x += stride, y += size) {
    vf squares = zero();
    float part[W];
    i64 i = 0;
    for (; i + W <= size; i += W) {
      for (int k = 0; k < W; k++) part[k] = widen(x[i + k]);
      const vf a = load(part);
      squares = fma(a, a, squares);
    }
    float total = sum(squares);
    for (; i < size; i++) total += widen(x[i]) * widen(x[i]);
    const float by = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
    for (i = 0; i < size; i++) narrow(widen(weight[i]) * rounded(widen(x[i]) * by, y), y + i);
  }
}

}  // namespace
