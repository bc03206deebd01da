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
    const i64 whole = size / W * W;
    i64 i = 0;
    for (; i < whole; i += W) {
      const vf a = widen_all(x + i);
      squares = fma(a, a, squares);
    }
    float total = sum(squares);
    for (; i < size; i++) total += widen(x[i]) * widen(x[i]);
    const float by = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
    for (i = 0; i < whole; i += W)
      narrow_all(mul(widen_all(weight + i), rounded(mul(widen_all(x + i), set1(by)), y)), y + i);
    for (; i < size; i++) narrow(widen(weight[i]) * rounded(widen(x[i]) * by, y), y + i);
  }
}

}  // namespace
