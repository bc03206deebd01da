// Vectors of float32: AVX-512, or AVX2 with FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using i64 = std::int64_t;
using bf16 = std::uint16_t;

#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int TILE_M = 4, TILE_N = 4;
using vf = __m512;
inline vf zero() { return _mm512_setzero_ps(); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf a) { _mm512_storeu_ps(p, a); }
inline vf set1(float a) { return _mm512_set1_ps(a); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
// The second operand is returned where either is NaN.
inline vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf round_even(vf a) { return _mm512_roundscale_ps(a, 0); }
inline vf scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
inline void load_halves(const bf16* p, vf& even, vf& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}
inline vf widen_all(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vf rounded_half(vf a) {  // to bfloat16 and back, as `narrow` does
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i cut = _mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(cut, nan, _mm512_set1_epi32(0x7fc00000)));
}
inline void store_half(bf16* p, vf rounded) {
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(rounded), 16);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(high));
}
inline float sum(vf a) {
  const __m256 low = _mm512_castps512_ps256(a);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
  const __m256 h = _mm256_add_ps(low, high);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
// The sums of TILE_N vectors, added up lane by lane in the same tree as `sum`.
inline void sums(const vf* a, float* to) {
  const __m512d a0 = _mm512_castps_pd(a[0]), a1 = _mm512_castps_pd(a[1]);
  const __m512d a2 = _mm512_castps_pd(a[2]), a3 = _mm512_castps_pd(a[3]);
  const vf h01 = add(_mm512_castpd_ps(_mm512_shuffle_f64x2(a0, a1, 0x44)),
                     _mm512_castpd_ps(_mm512_shuffle_f64x2(a0, a1, 0xee)));
  const vf h23 = add(_mm512_castpd_ps(_mm512_shuffle_f64x2(a2, a3, 0x44)),
                     _mm512_castpd_ps(_mm512_shuffle_f64x2(a2, a3, 0xee)));
  vf q = add(_mm512_shuffle_f32x4(h01, h23, 0x88), _mm512_shuffle_f32x4(h01, h23, 0xdd));
  q = add(q, _mm512_permute_ps(q, 0x4e));
  q = add(q, _mm512_permute_ps(q, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, q)));
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8;
constexpr int TILE_M = 4, TILE_N = 2;
using vf = __m256;
inline vf zero() { return _mm256_setzero_ps(); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf a) { _mm256_storeu_ps(p, a); }
inline vf set1(float a) { return _mm256_set1_ps(a); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf round_even(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf scale2(vf a, vf n) {  // n a whole number in [-252, 254]: in two halves, so that 2^n may be subnormal
  const __m256i whole = _mm256_cvtps_epi32(n), bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_srai_epi32(whole, 1), second = _mm256_sub_epi32(whole, first);
  const vf a1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23));
  const vf a2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23));
  return mul(mul(a, a1), a2);
}
inline void load_halves(const bf16* p, vf& even, vf& odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
}
inline vf widen_all(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline vf rounded_half(vf a) {  // to bfloat16 and back, as `narrow` does
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const vf cut = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000)));
  const vf nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  return _mm256_blendv_ps(cut, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
}
inline void store_half(bf16* p, vf rounded) {
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(rounded), 16);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128((__m128i*)p, halves);
}
inline float sum(vf h) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline void sums(const vf* a, float* to) {
  for (int n = 0; n < TILE_N; n++) to[n] = sum(a[n]);
}
#else
#error "AVX-512F, or AVX2 with FMA, is needed"
#endif

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;  // products of bfloat16 two at a time, without widening either factor
using vh = __m512bh;
inline vh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline vf add_pairs(vf a, vh x, vh w) { return _mm512_dpbf16_ps(a, x, w); }
#else
constexpr bool PAIRS = false;
#endif

constexpr int BLOCK = 2 * W;  // elements that K has to be a multiple of

inline float widen(bf16 a) {
  const std::uint32_t bits = static_cast<std::uint32_t>(a) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline float widen(float a) { return a; }

inline void narrow(float a, float* to) { *to = a; }
inline void narrow(float a, bf16* to) {  // to the nearest, ties to even, as torch rounds
  std::uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  if (a != a) {
    *to = 0x7fc0;
  } else {
    *to = static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

inline float rounded(float a, const float*) { return a; }
inline float rounded(float a, const bf16*) {
  bf16 to;
  narrow(a, &to);
  return widen(to);
}

inline vf widen_all(const float* p) { return load(p); }
inline vf rounded(vf a, const float*) { return a; }
inline vf rounded(vf a, const bf16*) { return rounded_half(a); }
inline void narrow_all(vf a, float* to) { store(to, a); }
inline void narrow_all(vf a, bf16* to) { store_half(to, rounded_half(a)); }

// exp to about 2 ulp; NaN stays NaN, and what is too large becomes infinity.
inline vf vexp(vf x) {
  x = vmin(set1(89.0f), vmax(set1(-104.0f), x));
  const vf n = round_even(mul(x, set1(1.44269504088896341f)));
  vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return scale2(p, n);
}

template <typename T>
T* scratch(std::vector<T>& buffer, i64 size) {
  if (static_cast<i64>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

}  // namespace
