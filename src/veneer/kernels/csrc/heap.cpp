#include "heap.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace veneer {

Heap::Heap(size_t size, size_t page, GiveBack give_back) : page_(page), give_back_(std::move(give_back)) {
    open(0, size);
}

void Heap::open(size_t start, size_t size) {
    holes_.emplace(start, size);
    sizes_.emplace(size, start);
}

size_t Heap::close(Pieces::iterator hole) {
    const size_t size = hole->second;
    sizes_.erase({size, hole->first});
    holes_.erase(hole);
    return size;
}

size_t Heap::take(size_t size) {
    size = std::max(alignment, (size + alignment - 1) / alignment * alignment);
    const auto place = sizes_.lower_bound({size, 0});
    if (place == sizes_.end()) return nowhere;
    const size_t start = place->second;
    const size_t hole = close(holes_.find(start));
    if (hole > size) open(start + size, hole - size);
    blocks_.emplace(start, size);
    live_ += size;
    most_ = std::max(most_, live_);
    use(start, size);
    if (held_ < most_ + share) return start;
    size_t over = held_ - most_;
    for (auto largest = sizes_.rbegin(); over && largest != sizes_.rend() && largest->first >= share; largest++)
        over -= give_back(largest->second, largest->first, over);
    return start;
}

void Heap::let_go(size_t start) {
    const auto block = blocks_.find(start);
    if (block == blocks_.end()) throw std::invalid_argument("no block of the heap begins there");
    size_t size = block->second;
    live_ -= size;
    blocks_.erase(block);
    auto next = holes_.lower_bound(start);
    if (next != holes_.end() && next->first == start + size) size += close(next++);
    if (next != holes_.begin()) {
        const auto before = std::prev(next);
        if (before->first + before->second == start) {
            start = before->first;
            size += close(before);
        }
    }
    open(start, size);
    if (size >= worth && used(start, size) >= worth) give_back(start, size, size);
}

// The pages of a piece are in use, if only in part.
void Heap::use(size_t start, size_t size) {
    size_t begin = start / page_ * page_, end = (start + size + page_ - 1) / page_ * page_;
    held_ += end - begin;
    auto piece = used_.upper_bound(begin);
    if (piece != used_.begin() && std::prev(piece)->second >= begin) piece--;
    while (piece != used_.end() && piece->first <= end) {
        const auto [from, to] = *piece;
        if (std::min(end, to) > std::max(begin, from)) held_ -= std::min(end, to) - std::max(begin, from);
        begin = std::min(begin, from);
        end = std::max(end, to);
        piece = used_.erase(piece);
    }
    used_.emplace(begin, end);
}

// Bytes of whole pages in use in a piece.
size_t Heap::used(size_t start, size_t size) const {
    const size_t first = (start + page_ - 1) / page_ * page_, last = (start + size) / page_ * page_;
    size_t bytes = 0;
    for (auto piece = used_.lower_bound(last); piece != used_.begin();) {
        const auto [from, to] = *--piece;
        if (to <= first) break;
        bytes += std::min(to, last) - std::max(from, first);
    }
    return bytes;
}

// Gives `most` bytes of a hole back, or as many as are in use there, its last pages first. How many they are.
size_t Heap::give_back(size_t start, size_t size, size_t most) {
    const size_t first = (start + page_ - 1) / page_ * page_, last = (start + size) / page_ * page_;
    size_t left = most;
    auto piece = used_.lower_bound(last);
    while (left && piece != used_.begin()) {
        const auto [from, to] = *--piece;
        if (to <= first) break;
        const size_t end = std::min(to, last);
        const size_t bytes = std::min((left + page_ - 1) / page_ * page_, end - std::max(from, first));
        piece = used_.erase(piece);
        if (end < to) piece = used_.emplace(end, to).first;
        if (from < end - bytes) piece = used_.emplace(from, end - bytes).first;
        give_back_(end - bytes, bytes);
        held_ -= bytes;
        left -= std::min(left, bytes);
    }
    return most - left;
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
    Region(char* begin, size_t size, size_t page)
        : begin(begin), size(size), heap(size, page, [begin](size_t start, size_t bytes) {
              madvise(begin + start, bytes, MADV_DONTNEED);
          }) {}

    char* const begin;
    const size_t size;
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
    region->heap.let_go(start);
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
    const auto page = size_t(sysconf(_SC_PAGESIZE));
    const size_t size = size_t(sysconf(_SC_PHYS_PAGES)) * page;
    void* begin = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) return "the system does not give so large a piece of address space";
    region = new Region(static_cast<char*>(begin), size, page);
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
