// Rows on their way to the ranks that hold their experts, and their sums on the way back.
//
// Layout and order are those of comm/dispatch.py. T tokens, K choices, N members, M rows, H hidden.
#pragma once

#include "vectors.h"

namespace {

// Which token goes to which member: M, the number of rows. A slot id is member * slots + slot, or
// negative for none. `tokens`, `by_token`: room for T * min(K, N).
i64 route(const i64* ids, i64 num_tokens, i64 choices, i64 members, i64 slots, i64* sent, i64* tokens, i64* by_token,
          i64* first_row) {
  static thread_local std::vector<char> goes_buffer;
  static thread_local std::vector<i64> next_buffer;
  char* goes = scratch(goes_buffer, num_tokens * members);
  i64* next = scratch(next_buffer, members);
  std::memset(goes, 0, num_tokens * members);
  std::memset(sent, 0, members * sizeof(i64));
  for (i64 t = 0; t < num_tokens; t++)
    for (i64 k = 0; k < choices; k++) {
      const i64 id = ids[t * choices + k];
      if (id < 0 || id >= members * slots) continue;
      char& one = goes[t * members + id / slots];
      sent[id / slots] += !one;
      one = 1;
    }
  i64 rows = 0;
  for (i64 n = 0; n < members; n++) {
    next[n] = rows;
    rows += sent[n];
  }
  i64 at = 0;
  for (i64 t = 0; t < num_tokens; t++) {
    first_row[t] = at;
    for (i64 n = 0; n < members; n++) {
      if (!goes[t * members + n]) continue;
      by_token[at++] = next[n];
      tokens[next[n]++] = t;
    }
  }
  return rows;
}

struct Row {
  i64 bytes;           // of a row on the wire
  i64 hidden_at;       // where its hidden state begins
  i64 hidden_bytes;
  i64 choices;         // ids first, then weights
};

void pack_rows(const Row& row, const char* hidden, i64 hidden_stride, const i64* ids, const float* weights,
               const i64* tokens, i64 rows, char* out) {
  const i64 of_ids = row.choices * sizeof(i64), of_weights = row.choices * sizeof(float);
  for (i64 m = 0; m < rows; m++, out += row.bytes) {
    const i64 t = tokens[m];
    std::memcpy(out, ids + t * row.choices, of_ids);
    std::memcpy(out + of_ids, weights + t * row.choices, of_weights);
    std::memcpy(out + row.hidden_at, hidden + t * hidden_stride, row.hidden_bytes);
  }
}

// From the members' pieces, one after another: ids from `first` on are this rank's slots, others
// become `slots`, with weight 0.
void unpack_rows(const Row& row, const char* const* pieces, const i64* counts, i64 members, i64 first, i64 slots,
                 char* hidden, i64* ids, float* weights) {
  for (i64 n = 0; n < members; n++) {
    const char* from = pieces[n];
    for (i64 i = 0; i < counts[n]; i++, from += row.bytes) {
      std::memcpy(hidden, from + row.hidden_at, row.hidden_bytes);
      hidden += row.hidden_bytes;
      for (i64 k = 0; k < row.choices; k++) {
        i64 id;
        float weight;
        std::memcpy(&id, from + k * sizeof(i64), sizeof id);
        std::memcpy(&weight, from + row.choices * sizeof(i64) + k * sizeof(float), sizeof weight);
        const bool here = id >= first && id < first + slots;
        *ids++ = here ? id - first : slots;
        *weights++ = here ? weight : 0.0f;
      }
    }
  }
}

// Add up each token's parts, in the order of its rows; `Part` float or double.
template <typename Part, typename Out>
void sum_parts(const char* const* pieces, const i64* counts, i64 members, i64 hidden, const i64* by_token,
               const i64* first_row, i64 num_tokens, i64 rows, Out* out) {
  static thread_local std::vector<const Part*> parts_buffer;
  static thread_local std::vector<Part> sum_buffer;
  const Part** parts = scratch(parts_buffer, rows);
  Part* sums = scratch(sum_buffer, hidden);
  i64 at = 0;
  for (i64 n = 0; n < members; n++)
    for (i64 i = 0; i < counts[n]; i++) parts[at++] = reinterpret_cast<const Part*>(pieces[n]) + i * hidden;
  for (i64 t = 0; t < num_tokens; t++, out += hidden) {
    const i64 end = t + 1 < num_tokens ? first_row[t + 1] : rows;
    std::fill(sums, sums + hidden, Part(0));
    for (i64 r = first_row[t]; r < end; r++) {
      const Part* part = parts[by_token[r]];
      for (i64 i = 0; i < hidden; i++) sums[i] += part[i];
    }
    for (i64 i = 0; i < hidden; i++) narrow(static_cast<float>(sums[i]), out + i);
  }
}

// Choices of rows that stay here: `slots` and weight 0 for none.
template <typename T>
void alone(const i64* ids, const T* weights, i64 count, i64 slots, i64* to_ids, float* to_weights) {
  for (i64 i = 0; i < count; i++) {
    to_ids[i] = ids[i] < 0 ? slots : ids[i];
    to_weights[i] = ids[i] < 0 ? 0.0f : widen(weights[i]);
  }
}

}  // namespace
