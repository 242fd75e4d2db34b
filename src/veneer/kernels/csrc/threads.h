// Work shared among threads, by the OpenMP runtime that torch has loaded. Not for the variants.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace veneer {

constexpr int64_t WORTH_SHARING = 1 << 14;  // elements from which on waking other threads brings more than it costs

// work(part, parts) on each of so many threads: which part of the work is this one's, of how many.
template <class Work>
void share(int64_t elements, int threads, const Work& work) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (elements > WORTH_SHARING)
    work(omp_get_thread_num(), omp_get_num_threads());
#else
    work(0, 1);
#endif
}

inline Rows rows_of(int64_t all, int part, int parts) {
    return {all * part / parts, all * (part + 1) / parts, all};
}

// Waits, within `share`, until every thread has come here.
inline void wait_for_all() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

}  // namespace veneer
