// Matrix products, experts and attention of a decoding step, for x86 with AVX2 or AVX-512.
//
// Weights are bfloat16 or float32, sums float32. Every element of a result is made by the same
// operations in the same order whatever else is computed beside it: how many rows a call has, how
// many threads share it and how tiles are cut leave each row's bits alone. (A dot product runs
// along K in two chains, even and odd elements, or one; lanes are then added up in a fixed tree.)
//
// Where the processor multiplies bfloat16 (AVX512_BF16), rows meet weights as they are. Elsewhere a
// vector register takes 2 W bfloat16 at once: the low halves of its 32-bit words are the even
// elements, shifted up, and the high halves the odd ones, masked. So rows they meet are *packed*:
// float32, in each block of 2 W elements the even ones before the odd ones.
//
// Legend: M rows, N outputs, K inner size, H hidden, I inner size of an expert, S slots, C choices
// of a row, P pairs of a row and a slot.

#include "attention.h"
#include "experts.h"
#include "heads.h"
#include "norms.h"
#include "products.h"
#include "router.h"
#include "rows.h"

// ---- called from Python; `half`: elements are bfloat16, else float32 ----------------------------

namespace {

template <typename T>
void project_as(const void* x, const void* const* weights, const void* const* biases, const void* const* norms,
                float query_eps, float key_eps, i64 heads, i64 kv_heads, i64 dim, i64 value_dim, const void* cos,
                const void* sin, const i64* slots, void* query, void* key_pages, void* value_pages, i64 m, i64 k,
                int threads) {
  const i64 sizes[3] = {heads * dim, kv_heads * dim, kv_heads * value_dim};
  Linear<T> layers[3];
  for (int i = 0; i < 3; i++) layers[i] = {(const T*)weights[i], (const T*)biases[i], nullptr, sizes[i]};
  const Heads<T> queries{(const T*)norms[0], query_eps, heads, dim}, keys{(const T*)norms[1], key_eps, kv_heads, dim};
  project((const T*)x, layers, queries, keys, sizes[2], (const T*)cos, (const T*)sin, slots, (T*)query,
          (T*)key_pages, (T*)value_pages, m, k, threads);
}

}  // namespace

extern "C" {

int rv_version() { return 1; }
int rv_block() { return BLOCK; }

void rv_linear(const void* x, i64 ldx, const void* w, const void* bias, void* y, i64 m, i64 n, i64 k, int half,
               int threads) {
  if (half) {
    const Linear<bf16> layer{(const bf16*)w, (const bf16*)bias, (bf16*)y, n};
    linears((const bf16*)x, ldx, &layer, 1, m, k, threads);
  } else {
    const Linear<float> layer{(const float*)w, (const float*)bias, (float*)y, n};
    linears((const float*)x, ldx, &layer, 1, m, k, threads);
  }
}

// `weights`, `biases`: of queries, keys and values; `norms`: of queries and keys.
void rv_project(const void* x, const void* const* weights, const void* const* biases, const void* const* norms,
                float query_eps, float key_eps, i64 heads, i64 kv_heads, i64 dim, i64 value_dim, const void* cos,
                const void* sin, const i64* slots, void* query, void* key_pages, void* value_pages, i64 m, i64 k,
                int half, int threads) {
  if (half) {
    project_as<bf16>(x, weights, biases, norms, query_eps, key_eps, heads, kv_heads, dim, value_dim, cos, sin, slots,
                     query, key_pages, value_pages, m, k, threads);
  } else {
    project_as<float>(x, weights, biases, norms, query_eps, key_eps, heads, kv_heads, dim, value_dim, cos, sin, slots,
                      query, key_pages, value_pages, m, k, threads);
  }
}

// `rounded`: weights are of the rows' type, else float32.
void rv_route_rows(const void* x, i64 ldx, const void* w, const void* missing, i64 m, i64 n, i64 k, i64 choices,
                   int normalise, int rounded, void* logits, void* weights, i64* ids, int half, int threads) {
  const bool* mask = (const bool*)missing;
  if (half && rounded) {
    route_rows((const bf16*)x, ldx, (const bf16*)w, mask, m, n, k, choices, normalise, (bf16*)logits, (bf16*)weights,
               ids, threads);
  } else if (half) {
    route_rows((const bf16*)x, ldx, (const bf16*)w, mask, m, n, k, choices, normalise, (bf16*)logits, (float*)weights,
               ids, threads);
  } else {
    route_rows((const float*)x, ldx, (const float*)w, mask, m, n, k, choices, normalise, (float*)logits,
               (float*)weights, ids, threads);
  }
}

void rv_experts(const void* x, const i64* slots, const float* weights, const void* gate_up, const void* down,
                void* out, i64 num_rows, i64 choices, i64 num_slots, i64 hidden, i64 inner, int half, int exact,
                int threads) {
  if (half && exact) {
    experts((const bf16*)x, slots, weights, (const bf16*)gate_up, (const bf16*)down, (double*)out, num_rows, choices,
            num_slots, hidden, inner, threads);
  } else if (half) {
    experts((const bf16*)x, slots, weights, (const bf16*)gate_up, (const bf16*)down, (float*)out, num_rows, choices,
            num_slots, hidden, inner, threads);
  } else if (exact) {
    experts((const float*)x, slots, weights, (const float*)gate_up, (const float*)down, (double*)out, num_rows,
            choices, num_slots, hidden, inner, threads);
  } else {
    experts((const float*)x, slots, weights, (const float*)gate_up, (const float*)down, (float*)out, num_rows,
            choices, num_slots, hidden, inner, threads);
  }
}

void rv_attention(const void* q, const void* keys, const void* values, const i64* rows, const i64* tables,
                  const i64* lengths, const float* sinks, void* out, i64 queries, i64 heads, i64 kv_heads, i64 dim,
                  i64 dim_v, i64 block_size, i64 q_row, i64 q_head, i64 table_width, i64 window, float scale,
                  int half, int threads) {
  const Attention a{queries, heads, kv_heads, dim, dim_v, block_size, q_row, q_head, table_width, window, scale};
  if (half) {
    attention(a, (const bf16*)q, (const bf16*)keys, (const bf16*)values, rows, tables, lengths, sinks, (bf16*)out,
              threads);
  } else {
    attention(a, (const float*)q, (const float*)keys, (const float*)values, rows, tables, lengths, sinks, (float*)out,
              threads);
  }
}

void rv_rms_norm(const void* x, i64 stride, const void* weight, void* y, i64 rows, i64 size, float eps, int half) {
  if (half) {
    rms_norm((const bf16*)x, stride, (const bf16*)weight, (bf16*)y, rows, size, eps);
  } else {
    rms_norm((const float*)x, stride, (const float*)weight, (float*)y, rows, size, eps);
  }
}

i64 rv_route(const i64* ids, i64 num_tokens, i64 choices, i64 members, i64 slots, i64* sent, i64* tokens,
             i64* by_token, i64* first_row) {
  return route(ids, num_tokens, choices, members, slots, sent, tokens, by_token, first_row);
}

void rv_pack_rows(i64 row_bytes, i64 hidden_at, i64 hidden_bytes, i64 choices, const void* hidden, i64 hidden_stride,
                  const i64* ids, const float* weights, const i64* tokens, i64 rows, void* out) {
  const Row row{row_bytes, hidden_at, hidden_bytes, choices};
  pack_rows(row, (const char*)hidden, hidden_stride, ids, weights, tokens, rows, (char*)out);
}

void rv_unpack_rows(i64 row_bytes, i64 hidden_at, i64 hidden_bytes, i64 choices, const char* const* pieces,
                    const i64* counts, i64 members, i64 first, i64 slots, void* hidden, i64* ids, float* weights) {
  const Row row{row_bytes, hidden_at, hidden_bytes, choices};
  unpack_rows(row, pieces, counts, members, first, slots, (char*)hidden, ids, weights);
}

void rv_alone(const i64* ids, const void* weights, int half, i64 count, i64 slots, i64* to_ids, float* to_weights) {
  if (half) {
    alone(ids, (const bf16*)weights, count, slots, to_ids, to_weights);
  } else {
    alone(ids, (const float*)weights, count, slots, to_ids, to_weights);
  }
}

void rv_sum_parts(const char* const* pieces, const i64* counts, i64 members, i64 hidden, const i64* by_token,
                  const i64* first_row, i64 num_tokens, i64 rows, void* out, int exact, int half) {
  if (half && exact) {
    sum_parts<double>(pieces, counts, members, hidden, by_token, first_row, num_tokens, rows, (bf16*)out);
  } else if (half) {
    sum_parts<float>(pieces, counts, members, hidden, by_token, first_row, num_tokens, rows, (bf16*)out);
  } else if (exact) {
    sum_parts<double>(pieces, counts, members, hidden, by_token, first_row, num_tokens, rows, (float*)out);
  } else {
    sum_parts<float>(pieces, counts, members, hidden, by_token, first_row, num_tokens, rows, (float*)out);
  }
}
}
