// What Python passes: addresses of tensors that it has checked. Not for the variants.
#pragma once

#include "kernels.h"

namespace veneer {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// nested_table is 0 where the scales are fp32 themselves.
inline Packed packed(Address codes, Address table, Address scales, Address nested_table, Address nested_scales, Address offset,
              int64_t block, int nested_shift) {
    Scales found{};
    if (nested_table) {
        found = {nullptr, at<const uint8_t>(scales), at<const float>(nested_table), at<const float>(nested_scales),
                 at<const float>(offset), nested_shift};
    } else {
        found.values = at<const float>(scales);
    }
    return {at<const uint8_t>(codes), at<const float>(table), found, block};
}

}  // namespace veneer
