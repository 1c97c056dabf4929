/* What the native kernels share: vectors, access to XLA's foreign function interface, a parallel loop. */

#ifndef EEJAX_KERNELS_H_
#define EEJAX_KERNELS_H_

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/c_api.h"

/* The widest vectors the target has, as GCC's and Clang's vector extension: one source for AVX-512, AVX2 and NEON. */
#if defined(__AVX512F__)
#define VL 16
#define REGISTERS 32
#elif defined(__AVX__)
#define VL 8
#define REGISTERS 16
#elif defined(__aarch64__)
#define VL 4
#define REGISTERS 32
#else
#define VL 4
#define REGISTERS 16
#endif

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(VL * 4), aligned(4), may_alias));

/* The largest head dimension: some tokens' heads are kept on the stack. `ops.py` refuses larger ones. */
#define MAX_DIM 256

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

INLINE vec load(const float* from) { return *(const vec*)from; }
INLINE void store(float* to, vec value) { *(vec*)to = value; }
INLINE vec splat(float value) { return value - (vec){0}; }
INLINE float sum_of(vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#elif defined(__AVX__)
  __m128 low = _mm_add_ps(_mm256_castps256_ps128((__m256)value), _mm256_extractf128_ps((__m256)value, 1));
  low = _mm_add_ps(low, _mm_movehl_ps(low, low));
  return _mm_cvtss_f32(_mm_add_ss(low, _mm_movehdup_ps(low)));
#else
  return (value[0] + value[2]) + (value[1] + value[3]);
#endif
}

/* a where the mask is set (all bits), b elsewhere. */
INLINE vec pick(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }

/* e^x for x <= 0, to two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE vec exponential(vec x) {
  x = larger(x, splat(-87.0f));
  vec scaled = x * splat(1.44269504f);
  ivec n = __builtin_convertvector(scaled - splat(0.5f), ivec);
  vec whole = __builtin_convertvector(n, vec);
  vec r = x - whole * splat(0.693359375f) + whole * splat(2.12194440e-4f);
  vec y = splat(1.0f / 720);
  y = y * r + splat(1.0f / 120);
  y = y * r + splat(1.0f / 24);
  y = y * r + splat(1.0f / 6);
  y = y * r + splat(0.5f);
  y = y * r * r + r + splat(1.0f);
  return (vec)((ivec)y + (n << 23));
}

/* x / (1 + e^-x) */
INLINE vec silu(vec x) {
  vec small = exponential(pick(x < (vec){0}, x, -x));
  return x * pick(x < (vec){0}, small, splat(1.0f)) / (splat(1.0f) + small);
}

/* Threads: as many as XLA's pool has, the caller being one of them. They do not belong to that pool: its idle threads
spin, and beside a caller that works they would take a core that a product, which is short, needs at once. */
int thread_count(const XLA_FFI_CallFrame* call);
typedef void Work(int64_t item, void* argument);
void parallel_for(const XLA_FFI_CallFrame* call, int64_t items, Work* work, void* argument);

INLINE const XLA_FFI_Buffer* argument(const XLA_FFI_CallFrame* call, int index) { return call->args.args[index]; }
INLINE const XLA_FFI_Buffer* result(const XLA_FFI_CallFrame* call, int index) { return call->rets.rets[index]; }

/* An attribute of 8 bytes; attributes arrive sorted by name. */
INLINE const void* attribute(const XLA_FFI_CallFrame* call, int index) {
  return ((const XLA_FFI_Scalar*)call->attrs.attrs[index])->value;
}

/* Registration asks each handler which version of the interface it was built for. True if that was all. */
INLINE int is_question(XLA_FFI_CallFrame* call) {
  XLA_FFI_InternalExtension* extension = call->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

#endif
