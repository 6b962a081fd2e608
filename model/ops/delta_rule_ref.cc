// The delta rule as the paper writes it. Never optimised.
#include <cstdint>
#include <vector>

#include "model/ops/delta_rule.h"

namespace deltanet {

template <typename T>
void DeltaRuleReference(int64_t tokens, int64_t key_dim, int64_t value_dim, const T* q, const T* k,
                        const T* v, const T* beta, T scale, T* state, T* out) {
  const int64_t K = key_dim, V = value_dim;
  std::vector<T> u(V);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < V; ++j) {
      T recalled = 0;  // (S^T k)_j
      for (int64_t i = 0; i < K; ++i) recalled += state[i * V + j] * k[t * K + i];
      u[j] = beta[t] * (v[t * V + j] - recalled);
    }
    for (int64_t i = 0; i < K; ++i) {
      for (int64_t j = 0; j < V; ++j) state[i * V + j] += k[t * K + i] * u[j];
    }
    for (int64_t j = 0; j < V; ++j) {
      T read = 0;  // (S^T q)_j
      for (int64_t i = 0; i < K; ++i) read += state[i * V + j] * q[t * K + i];
      out[t * V + j] = scale * read;
    }
  }
}

template void DeltaRuleReference<float>(int64_t, int64_t, int64_t, const float*, const float*, const float*,
                                        const float*, float, float*, float*);
template void DeltaRuleReference<double>(int64_t, int64_t, int64_t, const double*, const double*,
                                         const double*, const double*, double, double*, double*);

}  // namespace deltanet
