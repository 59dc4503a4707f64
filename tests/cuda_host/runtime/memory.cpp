// Device memory is memory of the host; pinned memory is known too, other memory of the host is not.
#include <sys/mman.h>

#include "state.h"

namespace cuda_host {
namespace {

constexpr size_t kPage = 4096;
constexpr unsigned char kBeyond = 0xA5;

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

cudaError_t allocate(State& s, void** to, size_t bytes, int device) {
  *to = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (device != kHost &&
      s.devices[device].used + bytes > s.devices[device].properties.totalGlobalMem)
    return result(cudaErrorMemoryAllocation);
  const size_t usable = whole_pages(bytes), mapped = usable + (s.guard ? kPage : 0);
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  auto* const mapping =
      static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, kFlags, -1, 0));
  if (mapping == MAP_FAILED) return result(cudaErrorMemoryAllocation);
  char* begin = mapping;
  if (s.guard) {
    mprotect(begin + usable, kPage, PROT_NONE);
    begin += (usable - bytes) / 16 * 16;  // the kernels make use of addresses that 16 divides
    std::memset(begin, 0xFF, bytes);      // NaN: what nobody wrote shows
    std::memset(begin + bytes, kBeyond, mapping + usable - begin - bytes);
  }
  *to = begin;
  if (device != kHost) s.devices[device].used += bytes;
  s.allocations[reinterpret_cast<uintptr_t>(begin)] = {bytes, device, mapping, mapped};
  return cudaSuccess;
}

cudaError_t release(State& s, void* address, bool host) {
  if (address == nullptr) return cudaSuccess;
  const auto found = s.allocations.find(reinterpret_cast<uintptr_t>(address));
  if (found == s.allocations.end() || (found->second.device == kHost) != host)
    return result(cudaErrorInvalidValue);
  for (const cudaStream_t stream : s.streams) drain(s, stream);
  const Allocation old = found->second;
  s.allocations.erase(found);
  if (!host) s.devices[old.device].used -= old.bytes;
  munmap(old.mapping, old.mapped);
  return result(s.sticky);
}

// Null where no allocation holds the address.
const Allocation* allocation_at(State& s, const void* address) {
  auto found = s.allocations.upper_bound(reinterpret_cast<uintptr_t>(address));
  if (found == s.allocations.begin()) return nullptr;
  --found;
  const bool inside = reinterpret_cast<uintptr_t>(address) < found->first + found->second.bytes;
  return inside ? &found->second : nullptr;
}

}  // namespace

std::string overrun(State& s) {
  if (!s.guard) return "";
  for (const auto& [begin, allocation] : s.allocations) {
    const auto* const end = reinterpret_cast<const unsigned char*>(begin + allocation.bytes);
    const auto* const page =
        reinterpret_cast<const unsigned char*>(allocation.mapping + allocation.mapped - kPage);
    for (const unsigned char* at = end; at < page; ++at)
      if (*at != kBeyond)
        return "an allocation of " + std::to_string(allocation.bytes) + " bytes was written " +
               std::to_string(at - end) + " bytes beyond its end";
  }
  return "";
}

}  // namespace cuda_host

using namespace cuda_host;

extern "C" {

cudaError_t cudaMalloc(void** to, size_t bytes) {
  ENTER;
  TRY(forbidden_in_capture(s, __func__));
  return allocate(s, to, bytes, current_device);
}
cudaError_t cudaFree(void* address) {
  ENTER;
  TRY(forbidden_in_capture(s, __func__));
  return release(s, address, false);
}
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
  ENTER;
  TRY(forbidden_in_capture(s, __func__));
  return allocate(s, to, bytes, kHost);
}
cudaError_t cudaFreeHost(void* address) {
  ENTER;
  return release(s, address, true);
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  ENTER;
  const Device& device = s.devices[current_device];
  *total = device.properties.totalGlobalMem;
  *available = *total - device.used;
  return cudaSuccess;
}
// As on a device: memory of the host that is not pinned has been read when the call returns, and
// has been written.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  if (allocation_at(s, from) == nullptr && stream->capture == nullptr) {
    const auto* const begin = static_cast<const char*>(from);
    const std::vector<char> staged(begin, begin + bytes);
    TRY(submit(stream, [=] { return std::memcpy(to, staged.data(), bytes), cudaSuccess; }));
  } else {
    TRY(submit(stream, [=] { return std::memmove(to, from, bytes), cudaSuccess; }));
  }
  if (allocation_at(s, to) == nullptr && stream->capture == nullptr) drain(s, stream);
  return result(s.sticky);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return submit(stream, [=] { return std::memset(to, value, bytes), cudaSuccess; });
}

}  // extern "C"
