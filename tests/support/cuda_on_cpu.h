// CUDA's blocks, warps and barriers on one CPU thread, so that kernels' logic runs without a GPU.
//
// Every thread of a block is a coroutine, which gives way at barriers and warp operations only. The order in which they
// continue is shuffled, so that a missing barrier shows as a wrong result in some order.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <setjmp.h>
#include <ucontext.h>
#include <vector>

#define ON_CPU
#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(threads)
#define __shared__ static  // one block runs at a time

struct Dim { unsigned x, y, z; };
struct float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace on_cpu {
enum State { READY, AT_WARP, AT_BLOCK, DONE };
struct Thread {
    ucontext_t start;
    jmp_buf here;
    bool started;
    State state;
    unsigned operations, barriers;
    std::vector<char> stack;
};
static std::vector<Thread> threads;
static std::vector<unsigned> slots[2];
static unsigned current;
static bool any[3];
static jmp_buf scheduler;
static void (*body)();
// xorshift64 (Marsaglia 2003): the library's generators and its shuffle take half of the compiler's time.
static uint64_t drawn;

inline unsigned draw(unsigned below) {
    drawn ^= drawn << 13;
    drawn ^= drawn >> 7;
    drawn ^= drawn << 17;
    return drawn % below;
}

inline void pause(State state) {
    threads[current].state = state;
    if (!_setjmp(threads[current].here)) _longjmp(scheduler, 1);
}

inline void enter() {
    body();
    threads[current].state = DONE;
    _longjmp(scheduler, 1);
}

inline void advance(unsigned index) {
    current = index;
    if (_setjmp(scheduler)) return;
    Thread& thread = threads[index];
    if (thread.started) _longjmp(thread.here, 1);
    thread.started = true;
    setcontext(&thread.start);
}

// Posts a value of a warp operation; returns the values of the warp's 32 threads.
inline const unsigned* exchange(unsigned value) {
    unsigned buffer = threads[current].operations++ % 2;
    slots[buffer][current] = value;
    pause(AT_WARP);
    return &slots[buffer][current / 32 * 32];
}

// Runs a block; returns whether all of its threads came to the end.
inline bool run_block(unsigned count, void (*function)()) {
    body = function;
    any[0] = false;
    threads.resize(count);
    for (auto& slot : slots) slot.resize(count);
    for (Thread& thread : threads) {
        thread.stack.resize(1 << 16);
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.data();
        thread.start.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.start, (void (*)())enter, 0);
        thread.started = false;
        thread.state = READY;
        thread.operations = thread.barriers = 0;
    }
    std::vector<unsigned> warps(count / 32);
    for (unsigned warp = 0; warp < warps.size(); ++warp) warps[warp] = warp;
    for (;;) {
        bool moved = false;
        for (unsigned left = warps.size(); left > 1; --left) std::swap(warps[left - 1], warps[draw(left)]);
        for (unsigned warp : warps) {
            unsigned rotation = draw(32);
            // A warp goes on by itself, as far as it can.
            for (bool again = true; again;) {
                unsigned waiting = 0;
                again = false;
                for (unsigned k = 0; k < 32; ++k) {
                    unsigned index = 32 * warp + (k + rotation) % 32;
                    if (threads[index].state == READY) {
                        advance(index);
                        moved = true;
                    }
                    waiting += threads[index].state == AT_WARP;
                }
                if (waiting == 32) {
                    for (unsigned k = 0; k < 32; ++k) threads[32 * warp + k].state = READY;
                    again = true;
                }
            }
        }
        unsigned blocked = 0, done = 0;
        for (Thread& thread : threads) {
            blocked += thread.state == AT_BLOCK;
            done += thread.state == DONE;
        }
        if (done == count) return true;
        if (blocked + done == count) {
            for (Thread& thread : threads)
                if (thread.state == AT_BLOCK) thread.state = READY;
        } else if (!moved) {
            return false;  // some wait for a barrier that the others do not come to
        }
    }
}
}  // namespace on_cpu

struct ThreadIndex {
    struct { operator unsigned() const { return on_cpu::current; } } x;
};
static ThreadIndex threadIdx;
static Dim blockIdx;

inline void __syncthreads() { on_cpu::pause(on_cpu::AT_BLOCK); }
// A barrier that says whether some thread came with a vote; the next one's answer is prepared before anyone comes there.
inline bool __syncthreads_or(bool vote) {
    const unsigned turn = on_cpu::threads[on_cpu::current].barriers++;
    on_cpu::any[(turn + 1) % 3] = false;
    on_cpu::any[turn % 3] |= vote;
    on_cpu::pause(on_cpu::AT_BLOCK);
    return on_cpu::any[turn % 3];
}
inline void __syncwarp() { on_cpu::exchange(0); }
inline unsigned __ballot_sync(unsigned, bool vote) {
    const unsigned* votes = on_cpu::exchange(vote);
    unsigned result = 0;
    for (int lane = 0; lane < 32; ++lane) result |= votes[lane] << lane;
    return result;
}
inline unsigned __shfl_sync(unsigned, unsigned value, int lane) { return on_cpu::exchange(value)[lane]; }
inline unsigned __shfl_up_sync(unsigned, unsigned value, int step) {
    unsigned lane = on_cpu::current % 32;
    return on_cpu::exchange(value)[lane >= (unsigned)step ? lane - step : lane];
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    unsigned before = *address;
    *address += value;
    return before;
}
template <class Bits> void atomicOr(Bits* address, Bits value) { *address |= value; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return __builtin_ffs(value); }
inline int __ffsll(unsigned long long value) { return __builtin_ffsll(value); }
inline int __clzll(unsigned long long value) { return value ? __builtin_clzll(value) : 64; }
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline float of_half(unsigned short bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float value = exponent == 31 ? (fraction ? NAN : INFINITY)
        : exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp((float)fraction, -24);
    return bits >> 15 ? -value : value;
}
