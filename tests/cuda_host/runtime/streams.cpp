// Streams that run their work only when something waits for it, events, and captured graphs.
#include <algorithm>
#include <chrono>

#include "state.h"

namespace cuda_host {

// Null, and 1 and 2 of cudaStreamLegacy and cudaStreamPerThread, name the current device's legacy
// stream.
cudaStream_t stream_of(State& s, cudaStream_t handle) {
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return s.legacy[current_device].get();
  return s.streams.count(handle) != 0 ? handle : nullptr;
}

void drain(State& s, cudaStream_t stream, uint64_t ticket) {
  while (stream->done < ticket && !stream->queue.empty()) {
    const Work work = std::move(stream->queue.front());
    stream->queue.pop_front();
    ++stream->done;
    const cudaError_t error = s.sticky == cudaSuccess ? work() : s.sticky;
    if (s.sticky == cudaSuccess) s.sticky = error;
  }
}
void drain_device(State& s, int device) {
  for (const cudaStream_t stream : s.streams)
    if (stream->device == device) drain(s, stream);
}

cudaError_t submit(State& s, cudaStream_t handle, Work work) {
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->capture) {
    stream->capture->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  // The legacy stream and those that are not cudaStreamNonBlocking wait for each other.
  const cudaStream_t legacy = s.legacy[stream->device].get();
  if (stream->waits_for_legacy()) drain(s, legacy);
  if (stream == legacy) {
    if (std::any_of(s.captures.begin(), s.captures.end(),
                    [](const auto& g) { return !g->invalid; }))
      for (const cudaStream_t other : s.streams)
        if (other->capture && other->waits_for_legacy())
          return forbidden_in_capture(s, "work on the legacy stream");
    for (const cudaStream_t other : s.streams)
      if (other->device == stream->device && other->waits_for_legacy()) drain(s, other);
  }
  stream->queue.push_back(std::move(work));
  ++stream->enqueued;
  return cudaSuccess;
}

cudaError_t forbidden_in_capture(State& s, const char* what) {
  if (s.captures.empty() || thread_capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (const auto& graph : s.captures) graph->invalid = true;
  return refuse(cudaErrorStreamCaptureUnsupported,
                std::string(what) + " while a stream is captured");
}

namespace {

cudaError_t synchronize(State& s, cudaStream_t stream, uint64_t ticket, const char* what) {
  if (stream->capture) {
    stream->capture->invalid = true;
    return refuse(cudaErrorStreamCaptureUnsupported,
                  std::string(what) + " of a stream that is captured");
  }
  if (stream->waits_for_legacy()) drain(s, s.legacy[stream->device].get());
  drain(s, stream, ticket);
  return result(s.sticky);
}
// Whoever polls gets there: a piece of work an inquiry.
cudaError_t query(State& s, cudaStream_t stream, uint64_t ticket) {
  if (stream->done >= ticket) return cudaSuccess;
  drain(s, stream, stream->done + 1);
  return cudaErrorNotReady;
}

}  // namespace
}  // namespace cuda_host

using namespace cuda_host;

extern "C" {

// ---- streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  ENTER(__func__);
  *stream = new CUstream_st{current_device, flags, priority, ++s.numbers};
  s.streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  ENTER(__func__);
  if (s.streams.count(stream) == 0) return result(cudaErrorInvalidResourceHandle);
  drain(s, stream);
  s.streams.erase(stream);  // its memory stays: events may name it
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  ENTER(__func__);
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  *priority = stream->priority;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  ENTER(__func__);
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  return synchronize(s, stream, UINT64_MAX, __func__);
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  ENTER(__func__);
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  return query(s, stream, stream->enqueued);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  ENTER(__func__);
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (event->capture && s.captures.count(event->capture) != 0) {  // the stream joins the capture
    if (stream->number == 0) return forbidden_in_capture(s, "a wait on the legacy stream");
    stream->capture = event->capture;
    return cudaSuccess;
  }
  const cudaStream_t before = event->stream;
  const uint64_t ticket = event->ticket;
  if (before == nullptr || before == stream || before->done >= ticket) return cudaSuccess;
  return submit(s, handle, [&s, before, ticket] { return drain(s, before, ticket), cudaSuccess; });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  ENTER(__func__);
  return submit(s, stream, [=] { return function(data), cudaSuccess; });
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  ENTER(__func__);
  *event = new CUevent_st{current_device};
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  ENTER(__func__);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  ENTER(__func__);
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->device != event->device)
    return refuse(cudaErrorInvalidResourceHandle, "an event and a stream of two devices");
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  event->stream = stream;
  event->ticket = stream->enqueued;
  event->milliseconds = std::chrono::duration<double, std::milli>(now).count();
  event->capture = stream->capture;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  ENTER(__func__);
  if (const auto error = forbidden_in_capture(s, __func__); error != cudaSuccess) return error;
  return event->stream == nullptr ? cudaSuccess : query(s, event->stream, event->ticket);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ENTER(__func__);
  if (event->stream == nullptr) return cudaSuccess;
  return synchronize(s, event->stream, event->ticket, __func__);
}
// Of the host's clock at the calls: no measure of anything.
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  return *milliseconds = float(end->milliseconds - begin->milliseconds), cudaSuccess;
}

// ---- capture

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, thread_capture_mode), cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  ENTER(__func__);
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  if (stream->number == 0 || stream->capture) return result(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<Graph>(Graph{++s.numbers, {}});
  stream->began_capture = true;
  s.captures.insert(stream->capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  ENTER(__func__);
  *graph = nullptr;
  if (s.streams.count(stream) == 0 || !stream->capture || !stream->began_capture)
    return result(cudaErrorIllegalState);
  const std::shared_ptr<Graph> captured = stream->capture;
  stream->began_capture = false;
  for (const cudaStream_t joined : s.streams)
    if (joined->capture == captured) joined->capture = nullptr;
  s.captures.erase(captured);
  if (captured->invalid) return result(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st{captured};
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  ENTER(__func__);
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  const std::shared_ptr<Graph>& capture = stream->capture;
  *status = !capture           ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  if (id != nullptr && capture) *id = capture->id;
  if (graph != nullptr) *graph = nullptr;
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = graph->graph->nodes.size(), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long) {
  ENTER(__func__);
  *executable = new CUgraphExec_st{graph->graph};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  ENTER(__func__);
  return submit(s, stream, [graph = executable->graph] {
    for (const Work& node : graph->nodes)
      if (const cudaError_t error = node(); error != cudaSuccess) return error;
    return cudaSuccess;
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return delete executable, cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned,
                                 unsigned) {
  return *object = nullptr, cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }

}  // extern "C"
