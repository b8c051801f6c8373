#pragma once

#include <cstdint>  // defines __GLIBC__ where that is the C library

// Marks a function whose loops gain from wider vectors: it is compiled for AVX2 as well, and the loader picks
// the version that the processor can run. No fused multiply-add, so that both versions give the same bits.
// Internal linkage: the choice would otherwise become a symbol that other libraries can see.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MLOMAE_VECTOR_LOOPS [[gnu::target_clones("avx2", "default")]] static
#else
#define MLOMAE_VECTOR_LOOPS static
#endif
