#include "heap.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

namespace veneer {

Heap::Heap(size_t size) { open(0, {size, 0}); }

void Heap::open(size_t start, Hole hole) {
    holes_.emplace(start, hole);
    sizes_.emplace(hole.size, start);
}

Heap::Hole Heap::close(Holes::iterator hole) {
    const Hole found = hole->second;
    sizes_.erase({found.size, hole->first});
    holes_.erase(hole);
    return found;
}

size_t Heap::take(size_t size) {
    size = std::max(alignment, (size + alignment - 1) / alignment * alignment);
    const auto place = sizes_.lower_bound({size, 0});
    if (place == sizes_.end()) return nowhere;
    const size_t start = place->second;
    const Hole hole = close(holes_.find(start));
    const size_t again = std::min(hole.used, size);
    if (hole.size > size) open(start + size, {hole.size - size, hole.used - again});
    blocks_.emplace(start, size);
    held_ += size - again;
    return start;
}

Heap::Piece Heap::let_go(size_t start) {
    const auto block = blocks_.find(start);
    if (block == blocks_.end()) throw std::invalid_argument("no block of the heap begins there");
    Hole hole{block->second, block->second};
    blocks_.erase(block);
    bool scattered = false;  // used bytes would not come first
    auto next = holes_.lower_bound(start);
    if (next != holes_.end() && next->first == start + hole.size) {
        const auto behind = next++;
        const Hole joined = close(behind);
        hole = {hole.size + joined.size, hole.used + joined.used};
    }
    if (next != holes_.begin()) {
        const auto before = std::prev(next);
        if (before->first + before->second.size == start) {
            start = before->first;
            const Hole joined = close(before);
            scattered = joined.used < joined.size;
            hole = {hole.size + joined.size, hole.used + joined.used};
        }
    }
    const Piece piece{start, hole.used >= worth || scattered ? hole.size : 0};
    if (piece.size) {
        held_ -= hole.used;
        hole.used = 0;
    }
    open(start, hole);
    return piece;
}

}  // namespace veneer

#if defined(__linux__) && defined(__LP64__)

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

namespace veneer {
namespace {

// Never destroyed: tensors may be let go after the extension's own objects.
struct Region {
    char* begin;
    size_t size;
    Heap heap;
    std::mutex lock;
};
Region* region = nullptr;

// Both stand in for functions of C, which throw nothing.
int aligned(void** out, size_t alignment, size_t size) noexcept {
    if (size >= Heap::least && alignment <= Heap::alignment) {
        const std::lock_guard<std::mutex> guard(region->lock);
        const size_t start = region->heap.take(size);
        if (start != Heap::nowhere) {
            *out = region->begin + start;
            return 0;
        }
    }
    return posix_memalign(out, alignment, size);
}

void let_go(void* block) noexcept {
    const size_t start = size_t(static_cast<char*>(block) - region->begin);
    if (start >= region->size) return free(block);  // from before, or a small one
    const std::lock_guard<std::mutex> guard(region->lock);
    const Heap::Piece piece = region->heap.let_go(start);
    if (!piece.size) return;
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t first = (piece.start + page - 1) / page * page;
    const size_t last = (piece.start + piece.size) / page * page;
    madvise(region->begin + first, last - first, MADV_DONTNEED);
}

// Where libc10 keeps the addresses of the functions that it calls by these names.
struct Slots {
    std::vector<void**> aligned, free;
};

int look(dl_phdr_info* library, size_t, void* found) {
    const char* name = std::strrchr(library->dlpi_name, '/');
    if (!name || std::strncmp(name, "/libc10.so", 10)) return 0;
    const ElfW(Dyn)* dynamic = nullptr;
    for (int i = 0; i < library->dlpi_phnum; i++)
        if (library->dlpi_phdr[i].p_type == PT_DYNAMIC)
            dynamic = reinterpret_cast<const ElfW(Dyn)*>(library->dlpi_addr + library->dlpi_phdr[i].p_vaddr);
    if (!dynamic) return 1;
    ElfW(Addr) strings = 0, symbols = 0, tables[2] = {};
    size_t sizes[2] = {};
    for (; dynamic->d_tag != DT_NULL; dynamic++) {
        const auto value = dynamic->d_un.d_ptr;
        switch (dynamic->d_tag) {
            case DT_STRTAB: strings = value; break;
            case DT_SYMTAB: symbols = value; break;
            case DT_RELA: tables[0] = value; break;
            case DT_RELASZ: sizes[0] = value; break;
            case DT_JMPREL: tables[1] = value; break;
            case DT_PLTRELSZ: sizes[1] = value; break;
        }
    }
    // glibc has put addresses there; other loaders leave offsets.
    const auto base = library->dlpi_addr;
    const auto at = [base](ElfW(Addr) value) { return value < base ? value + base : value; };
    auto& slots = *static_cast<Slots*>(found);
    for (int table = 0; table < 2; table++) {
        const auto* entries = reinterpret_cast<const ElfW(Rela)*>(at(tables[table]));
        for (size_t i = 0; i < sizes[table] / sizeof(ElfW(Rela)); i++) {
            const auto symbol = ELF64_R_SYM(entries[i].r_info);
            if (!symbol) continue;
            const auto& entry = reinterpret_cast<const ElfW(Sym)*>(at(symbols))[symbol];
            const char* called = reinterpret_cast<const char*>(at(strings)) + entry.st_name;
            auto** slot = reinterpret_cast<void**>(library->dlpi_addr + entries[i].r_offset);
            if (!std::strcmp(called, "posix_memalign")) slots.aligned.push_back(slot);
            if (!std::strcmp(called, "free")) slots.free.push_back(slot);
        }
    }
    return 1;
}

// Pages that the loader has made read-only stay writable from then on.
bool put(const std::vector<void**>& slots, void* function) {
    const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
    for (void** slot : slots) {
        void* begin = reinterpret_cast<void*>(uintptr_t(slot) / page * page);
        if (mprotect(begin, page, PROT_READ | PROT_WRITE)) return false;
        __atomic_store_n(slot, function, __ATOMIC_RELEASE);  // other threads may be calling
    }
    return true;
}

// Whether a function is the C library's own, and not that of an allocator that the user has put before it.
bool of_libc(void* function, void* other) {
    Dl_info one, two;
    return dladdr(function, &one) && dladdr(other, &two) && one.dli_fbase == two.dli_fbase;
}

const char* install() {
    // Of getppid nobody makes a version of his own.
    if (!of_libc(reinterpret_cast<void*>(&posix_memalign), reinterpret_cast<void*>(&getppid)))
        return "another allocator stands before the C library's";
    rlimit space;
    if (getrlimit(RLIMIT_AS, &space) || space.rlim_cur != RLIM_INFINITY)
        return "the process's address space is limited";
    Slots slots;
    dl_iterate_phdr(look, &slots);
    if (slots.aligned.empty() || slots.free.empty()) return "PyTorch does not allocate in the way that is known";
    const size_t size = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
    void* begin = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) return "the system does not give so large a piece of address space";
    region = new Region{static_cast<char*>(begin), size, Heap(size), {}};
    // A fork while another thread holds the lock would leave it locked in the child.
    pthread_atfork([] { region->lock.lock(); }, [] { region->lock.unlock(); }, [] { region->lock.unlock(); });
    // First what lets go: it knows the blocks of both.
    if (!put(slots.free, reinterpret_cast<void*>(&let_go)) || !put(slots.aligned, reinterpret_cast<void*>(&aligned)))
        return "the addresses of PyTorch's allocator cannot be written to";
    return "";
}

}  // namespace

const char* use_heap() {
    static const char* const reason = install();
    return reason;
}

}  // namespace veneer

#else

const char* veneer::use_heap() { return "it is made for Linux on 64 bits"; }

#endif
