// The stream of unidrop, version 1, for CUDA kernels and for C++ on the host.
//
// The specification is docs/spec.md. Everything here is a pure function of its arguments, so a
// backward kernel recomputes the mask of its forward kernel. check.cu is an example.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define UNIDROP_FUNCTION __host__ __device__ __forceinline__
#else
#define UNIDROP_FUNCTION inline
#endif

namespace unidrop {

// Four words: a counter of the generator, or a block of the mask, which decides eight elements.
struct Words {
    uint32_t w0, w1, w2, w3;
};

// Philox4x32-10. Each product of 32-bit words is 64-bit, one instruction on NVIDIA's GPUs.
UNIDROP_FUNCTION Words philox(Words c, uint64_t key) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c.w0, p1 = (uint64_t)0xCD9E8D57u * c.w2;
        c = {(uint32_t)(p1 >> 32) ^ c.w1 ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c.w3 ^ k1, (uint32_t)p0};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// Return the key that Key(key).fold_in(integer) returns. A layer folds in its call number.
UNIDROP_FUNCTION uint64_t fold_in(uint64_t key, uint64_t integer) {
    Words c = philox({(uint32_t)integer, (uint32_t)(integer >> 32), 0, 1}, key);
    return (uint64_t)c.w1 << 32 | c.w0;
}

// Return the block of the mask that decides elements 8 * number to 8 * number + 7.
UNIDROP_FUNCTION Words mask_block(uint64_t key, uint64_t number) {
    return philox({(uint32_t)number, (uint32_t)(number >> 32), 0, 0}, key);
}

// Return u of an element of a block, 0 to 7. Unroll loops over elements, so that this is free.
UNIDROP_FUNCTION uint32_t u(Words block, unsigned element) {
    uint32_t word = element & 4 ? (element & 2 ? block.w3 : block.w2) : (element & 2 ? block.w1 : block.w0);
    return element & 1 ? word * 0x6C078965u : word;
}

// Return u of element i of the whole mask, in C order. It generates a block for this element alone.
UNIDROP_FUNCTION uint32_t u(uint64_t key, uint64_t i) { return u(mask_block(key, i / 8), (unsigned)(i % 8)); }

// A drop rate. Make it on the host, from a double: the float 0.1f is another number.
struct Rate {
    uint64_t threshold;  // from 0 to 2^32; the last keeps nothing
    double scale;        // the factor of kept elements

    explicit Rate(double p) : threshold((uint64_t)std::rint(p * 4294967296.0)), scale(p < 1 ? 1 / (1 - p) : 0) {}
};

UNIDROP_FUNCTION bool keep(uint32_t u, uint64_t threshold) { return u >= threshold; }

// Return the output for an element: convert half precision to float before, and back after.
UNIDROP_FUNCTION float apply(float x, bool keep, float scale) { return keep ? x * scale : 0.0f; }
UNIDROP_FUNCTION double apply(double x, bool keep, double scale) { return keep ? x * scale : 0.0; }

}  // namespace unidrop
