// Vectors of one instruction set: W floats. Included inside the namespace of a translation unit.
// Everything here is inlined, so that no code of one instruction set is linked into another's.

#define INLINE static inline __attribute__((always_inline))

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int W = FASTGEN_WIDTH;
typedef float vf __attribute__((vector_size(4 * FASTGEN_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * FASTGEN_WIDTH)));
typedef vf vf_unaligned __attribute__((aligned(4), may_alias));
typedef vi vi_unaligned __attribute__((aligned(4), may_alias));

INLINE int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t higher(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE void fill(float* from, float* end, float x) {
  for (; from < end; ++from) *from = x;
}

#if FASTGEN_WIDTH == 16
INLINE vf splat(float x) { return (vf)_mm512_set1_ps(x); }
#else
INLINE vf splat(float x) { return (vf)_mm256_set1_ps(x); }
#endif
INLINE vi splat_int(int32_t x) { return vi{} + x; }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
INLINE vi iota() {
  vi i;
  for (int j = 0; j < W; ++j) i[j] = j;
  return i;
}

INLINE vf load(const float* p) { return *(const vf_unaligned*)p; }
INLINE void store(float* p, vf x) { *(vf_unaligned*)p = x; }
INLINE vi load_int(const int32_t* p) { return *(const vi_unaligned*)p; }

INLINE vi to_bf16_bits(vf x) {  // round to nearest even; NaN stays NaN
  vi bits = (vi)x;
  vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded & 0xffff : splat_int(0x7fc0);
}

#if FASTGEN_WIDTH == 16
INLINE vf load(const bf16* p) {
  __m256i raw = _mm256_loadu_si256((const __m256i*)p);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
}
INLINE vf load(const f16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
INLINE void store(bf16* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)to_bf16_bits(x)));
}
INLINE void store(f16* p, vf x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
typedef __m256 half_vf;
INLINE __m256 fold(vf x) {
  __m512d d = (__m512d)x;
  return _mm256_castpd_ps(_mm512_castpd512_pd256(d)) +
         _mm256_castpd_ps(_mm512_extractf64x4_pd(d, 1));
}
INLINE float hmax(vf x) { return _mm512_reduce_max_ps((__m512)x); }
#else
INLINE vf load(const bf16* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store(bf16* p, vf x) {
  __m256i bits = (__m256i)to_bf16_bits(x);
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128((__m128i*)p, packed);
}
INLINE void store(f16* p, vf x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE __m256 fold(vf x) { return (__m256)x; }
INLINE float hmax(vf x) {
  __m128 best = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  best = _mm_max_ps(best, _mm_movehl_ps(best, best));
  return _mm_cvtss_f32(_mm_max_ss(best, _mm_movehdup_ps(best)));
}
#endif

// The sums of four vectors.
INLINE __m128 hsum4(vf a, vf b, vf c, vf d) {
  __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
  __m256 sums = _mm256_hadd_ps(ab, cd);
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}
INLINE float hsum(vf x) {
  __m256 y = fold(x);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// 2^x for x <= 0, within 2e-7 of its size from -126 on, 1 at 0 and 0 at -inf. With AVX2 all below
// -126 is 0.
#if FASTGEN_WIDTH == 16
INLINE vf exp2_nonpositive(vf x) {
  vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // x less its floor; 0 of -inf
  vf p = splat(1.8793186e-3f);
  p = p * f + 8.9909956e-3f;
  p = p * f + 5.5818677e-2f;
  p = p * f + 0.24015927f;
  p = p * f + 0.69315171f;
  p = p * f + 1.0f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
}
#else
INLINE vf exp2_nonpositive(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vf clamped = vmax(x, splat(-126.0f));
  vf shifted = clamped + magic;
  vf f = clamped - (shifted - magic);
  vi n = (vi)shifted - (vi)splat(magic);
  vf p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  vf result = (vf)((vi)p + (n << 23));
  return x >= -126.0f ? result : splat(0.0f);
}
#endif

constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
constexpr float kMinusInfinity = -__builtin_inff();
