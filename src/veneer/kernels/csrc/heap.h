// Where tensors lie: one piece of address space, cut into blocks with nothing between them.
//
// glibc's heap cuts an aligned block out of a piece that is 96 bytes longer, and gives what is left of that to small
// objects. They live as long as the graph, and beside one of them the hole that a block leaves is too small for the next
// block of its size: of a training step's activations glibc holds a fifth to a half more than there are, and not the
// same twice. Here a hole takes any block up to its own size, small objects lie elsewhere, and the same blocks in the
// same order take the same memory.
#pragma once

#include <cstddef>
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
    // Used bytes of a hole from which on they are given back to the system: more than the activations of most steps,
    // which would have to be asked for again, and a large model in any case.
    static constexpr size_t worth = size_t(1) << 30;

    struct Piece {
        size_t start, size;
    };

    explicit Heap(size_t size);

    // Where a block of `size` bytes begins: in the smallest hole that it fits into, of equal ones the first; or
    // nowhere.
    size_t take(size_t size);

    // The block that begins at `start` is let go. The piece that is to be given back now, or one of size 0. Throws
    // std::invalid_argument where none begins.
    Piece let_go(size_t start);

    // Bytes that the system has given for what was ever taken here, but for what was given back.
    size_t held() const { return held_; }

private:
    struct Hole {
        size_t size, used;  // used: bytes that were blocks since they were last given back, at most; they come first
    };
    using Holes = std::map<size_t, Hole>;

    void open(size_t start, Hole hole);
    Hole close(Holes::iterator hole);

    Holes holes_;  // by where they begin
    std::set<std::pair<size_t, size_t>> sizes_;  // of the same: size, begin
    std::unordered_map<size_t, size_t> blocks_;  // begin → size
    size_t held_ = 0;
};

// From now on PyTorch's blocks of a page and more lie in such a heap, in all of the process: the addresses by which its
// library calls the C library's allocator are replaced. Why not, where it cannot be; else an empty string.
const char* use_heap();

}  // namespace veneer
