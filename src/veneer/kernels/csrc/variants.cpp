#include "variants.h"

#include <stdexcept>

#ifdef VENEER_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace veneer {
namespace {

#ifdef VENEER_AMX
// Whether the processor has AMX for bf16, and the system lets this process use its registers.
bool has_tiles() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // Linux: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, AVX512_BF16 = 1u << 5;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILE)) != (BF16 | TILE)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return false;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

std::vector<const Variant*> runnable() {
    std::vector<const Variant*> found{&scalar};
#ifdef VENEER_X86
    // These ask the processor, and whether the system saves its wide registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vnni")) {
            found.push_back(&avx512);
#ifdef VENEER_AMX
            if (has_tiles()) found.push_back(&with_tiles());
#endif
        }
    }
#endif
#ifdef VENEER_ARM
    found.push_back(&neon);
#endif
    return found;
}

}  // namespace

const Variant& variant(const std::string& name) {
    static const std::vector<const Variant*> all = runnable();
    for (const Variant* one : all)
        if (name == one->name) return *one;
    throw std::invalid_argument("this machine has no variant " + name);
}

std::vector<std::string> variants() {
    std::vector<std::string> names;
    for (const Variant* one : runnable()) names.emplace_back(one->name);
    return names;
}

}  // namespace veneer
