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
  if (device != kHost && s.devices[device].used + bytes > s.devices[device].total)
    return result(cudaErrorMemoryAllocation);
  const size_t usable = whole_pages(bytes), mapped = usable + (s.guard ? kPage : 0);
  void* const mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return result(cudaErrorMemoryAllocation);
  char* begin = static_cast<char*>(mapping);
  if (s.guard) {
    mprotect(begin + usable, kPage, PROT_NONE);
    begin += (usable - bytes) / 16 * 16;  // the kernels make use of addresses that 16 divides
    std::memset(begin, 0xFF, bytes);      // NaN: what nobody wrote shows
    std::memset(begin + bytes, kBeyond, static_cast<char*>(mapping) + usable - begin - bytes);
  }
  *to = begin;
  if (device != kHost) s.devices[device].used += bytes;
  s.allocations[reinterpret_cast<uintptr_t>(begin)] = {bytes, device, static_cast<char*>(mapping),
                                                       mapped};
  return cudaSuccess;
}

cudaError_t release(State& s, void* address, bool host) {
  if (address == nullptr) return cudaSuccess;
  const auto found = s.allocations.find(reinterpret_cast<uintptr_t>(address));
  if (found == s.allocations.end() || (found->second.device == kHost) != host)
    return result(cudaErrorInvalidValue);
  for (size_t device = 0; device < s.devices.size(); ++device) drain_device(s, int(device));
  const Allocation old = found->second;
  s.allocations.erase(found);
  if (!host) s.devices[old.device].used -= old.bytes;
  if (old.mapping != nullptr) munmap(old.mapping, old.mapped);
  return result(s.sticky);
}

// As on a device: memory of the host that is not pinned has been read when the call returns, and
// has been written.
cudaError_t copy(State& s, void* to, const void* from, size_t bytes, cudaStream_t handle) {
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  const bool captured = stream->capture != nullptr;
  cudaError_t error;
  if (allocation_at(s, from) == nullptr && !captured) {
    const auto* const bytes_of = static_cast<const char*>(from);
    const auto staged = std::make_shared<std::vector<char>>(bytes_of, bytes_of + bytes);
    error = submit(s, handle, [=] { return std::memcpy(to, staged->data(), bytes), cudaSuccess; });
  } else {
    error = submit(s, handle, [=] { return std::memmove(to, from, bytes), cudaSuccess; });
  }
  if (error == cudaSuccess && allocation_at(s, to) == nullptr && !captured) drain(s, stream);
  return error != cudaSuccess ? error : result(s.sticky);
}

}  // namespace

const Allocation* allocation_at(State& s, const void* address) {
  auto found = s.allocations.upper_bound(reinterpret_cast<uintptr_t>(address));
  if (found == s.allocations.begin()) return nullptr;
  --found;
  const bool inside = reinterpret_cast<uintptr_t>(address) < found->first + found->second.bytes;
  return inside ? &found->second : nullptr;
}

std::string overrun(State& s) {
  if (!s.guard) return "";
  for (const auto& [begin, allocation] : s.allocations) {
    if (allocation.mapping == nullptr) continue;
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
  ENTER(__func__);
  if (const auto error = forbidden_in_capture(s, __func__); error != cudaSuccess) return error;
  return allocate(s, to, bytes, current_device);
}
cudaError_t cudaFree(void* address) {
  ENTER(__func__);
  if (const auto error = forbidden_in_capture(s, __func__); error != cudaSuccess) return error;
  return release(s, address, false);
}
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
  ENTER(__func__);
  if (const auto error = forbidden_in_capture(s, __func__); error != cudaSuccess) return error;
  return allocate(s, to, bytes, kHost);
}
cudaError_t cudaFreeHost(void* address) {
  ENTER(__func__);
  return release(s, address, true);
}
cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  ENTER(__func__);
  s.allocations[reinterpret_cast<uintptr_t>(address)] = {bytes, kHost, nullptr, 0};
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* address) {
  ENTER(__func__);
  s.allocations.erase(reinterpret_cast<uintptr_t>(address));
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  ENTER(__func__);
  *total = s.devices[current_device].total;
  *available = *total - s.devices[current_device].used;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  ENTER(__func__);
  *attributes = {};
  attributes->device = current_device;
  const Allocation* const found = allocation_at(s, address);
  if (found == nullptr) return cudaSuccess;  // of type cudaMemoryTypeUnregistered
  attributes->devicePointer = const_cast<void*>(address);
  attributes->type = found->device == kHost ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  if (found->device == kHost)
    attributes->hostPointer = const_cast<void*>(address);
  else
    attributes->device = found->device;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  ENTER(__func__);
  return copy(s, to, from, bytes, stream);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                cudaStream_t stream) {
  ENTER(__func__);
  return copy(s, to, from, bytes, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  ENTER(__func__);
  if (const auto error = forbidden_in_capture(s, __func__); error != cudaSuccess) return error;
  const cudaError_t error = copy(s, to, from, bytes, nullptr);
  drain(s, s.legacy[current_device].get());
  return error;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  ENTER(__func__);
  return submit(s, stream, [=] { return std::memset(to, value, bytes), cudaSuccess; });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

}  // extern "C"
