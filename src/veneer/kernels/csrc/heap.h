// Where tensors lie: one piece of address space, cut into blocks with nothing between them.
//
// glibc's heap cuts an aligned block out of a piece that is 96 bytes longer, and gives what is left of that to small
// objects. They live as long as the graph, and beside one of them the hole that a block leaves is too small for the next
// block of its size: of a training step's activations glibc holds a fifth to a half more than there are, and not the
// same twice. Here a hole takes any block up to its own size, small objects lie elsewhere, and before the heap takes
// more memory than its blocks ever took at a time, it gives back what its holes have. So holes cost nothing, whatever
// the sizes of the next step's blocks are.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>

namespace veneer {

// Which bytes are whose; it touches none of them.
class Heap {
public:
    static constexpr size_t nowhere = ~size_t(0);
    static constexpr size_t alignment = 64;  // as PyTorch asks for
    static constexpr size_t least = 4096;    // bytes of a block; smaller ones of a process stay where they were
    // Used bytes of a hole from which on they are given back at once: more than the activations of most steps, which
    // would have to be asked for again, and a large model in any case.
    static constexpr size_t worth = size_t(1) << 30;
    // What is given back at a time, at least: each time is a call of the system.
    static constexpr size_t share = size_t(1) << 20;

    // Gives bytes back to the system: where they begin, and how many; whole pages.
    using GiveBack = std::function<void(size_t start, size_t size)>;

    Heap(size_t size, size_t page, GiveBack give_back);

    // Where a block of `size` bytes begins: in the smallest hole that it fits into, of equal ones the first; or
    // nowhere.
    size_t take(size_t size);

    // The block that begins at `start` is let go. Throws std::invalid_argument where none begins.
    void let_go(size_t start);

    // Bytes of the pages that the system has given for what was ever taken here, but for what was given back.
    size_t held() const { return held_; }

private:
    using Pieces = std::map<size_t, size_t>;  // begin → end, or size

    void open(size_t start, size_t size);
    size_t close(Pieces::iterator hole);
    void use(size_t start, size_t size);
    size_t used(size_t start, size_t size) const;
    size_t give_back(size_t start, size_t size, size_t most);

    const size_t page_;
    const GiveBack give_back_;
    Pieces holes_;                               // begin → size
    std::set<std::pair<size_t, size_t>> sizes_;  // of the same: size, begin
    std::unordered_map<size_t, size_t> blocks_;  // begin → size
    Pieces used_;                                // pages that were blocks since they were last given back: begin → end
    size_t held_ = 0;                            // bytes of these
    size_t live_ = 0, most_ = 0;                 // bytes of blocks: now, and the most at a time
};

// From now on PyTorch's blocks of a page and more lie in such a heap, in all of the process: the addresses by which its
// library calls the C library's allocator are replaced. Why not, where it cannot be; else an empty string.
const char* use_heap();

}  // namespace veneer
