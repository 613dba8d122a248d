/*
 * Programmatic dependent launch (sm_90): a kernel whose launch overlaps the end of the one before.
 *
 * The first kernel says release_dependents() when the next may start to take free places; the next
 * says wait_for_prerequisites() before it touches what the first wrote. Without the launch
 * attribute, and below sm_90, both do nothing and stream order holds.
 */
#pragma once

namespace dspark {

/* Counts once all CTAs have called it or ended. */
__device__ __forceinline__ void release_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

/* Returns when the kernel before has ended and its writes are visible. Every CTA has to call it,
 * also one without work: a grid that ends without waiting could end before its predecessor, and
 * stream order would no longer hold for what comes after. */
__device__ __forceinline__ void wait_for_prerequisites() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace dspark
