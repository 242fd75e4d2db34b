// What AVX-512 computes, and products in bf16 by AMX tiles (AMX TILE and BF16, AVX-512 BF16).
#include "kernels.h"

namespace veneer {

const Variant& with_tiles() {
    static const Variant made = [] {
        Variant variant = avx512;
        variant.name = "amx";
        return variant;
    }();
    return made;
}

}  // namespace veneer
