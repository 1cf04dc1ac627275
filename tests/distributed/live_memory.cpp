// An allocator of torch's CPU tensors that counts, in all threads, the bytes that are alive and the most there were.

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

namespace {

std::mutex lock;
std::unordered_map<void*, size_t> sizes;
size_t live = 0, most = 0;
thread_local bool counts = true;

void release(void* data) {
  {
    std::lock_guard<std::mutex> guard(lock);
    auto found = sizes.find(data);
    if (found != sizes.end()) {
      live -= found->second;
      sizes.erase(found);
    }
  }
  c10::free_cpu(data);
}

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    if (!counts) return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    std::lock_guard<std::mutex> guard(lock);
    if (data) sizes[data] = size;
    live += data ? size : 0;
    most = std::max(most, live);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

Counting counting;

}  // namespace

extern "C" {

void count_from_here() { c10::SetCPUAllocator(&counting, 255); }

// Of this thread, from here on.
void count(bool yes) { counts = yes; }

size_t live_bytes() {
  std::lock_guard<std::mutex> guard(lock);
  return live;
}

// The most since the last call.
size_t most_bytes() {
  std::lock_guard<std::mutex> guard(lock);
  const size_t found = most;
  most = live;
  return found;
}
}
