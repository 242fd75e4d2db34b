// What AVX-512 computes, and products in bf16 by AMX tiles (AMX TILE and BF16, AVX-512 BF16).
#include "kernels.h"
#include "tiled.h"

#include "amx_product.h"

namespace veneer {

const Variant& with_tiles() {
    static const Variant made = [] {
        Variant variant = avx512;
        variant.name = "amx";
        variant.tiled_room = tiled_room;
        variant.lay_out = lay_out;
        variant.multiply = multiply;
        variant.lay_out_backward = lay_out_backward;
        variant.multiply_backward = multiply_backward;
        return variant;
    }();
    return made;
}

}  // namespace veneer
