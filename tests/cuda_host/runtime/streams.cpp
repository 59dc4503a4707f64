// Streams that run their work only when something waits for it, events, and captured graphs.
#include <algorithm>
#include <chrono>

#include "state.h"

namespace cuda_host {

// Null, and 1 and 2 of cudaStreamLegacy and cudaStreamPerThread, name the current device's legacy
// stream.
cudaStream_t stream_of(State& s, cudaStream_t handle) {
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return s.legacy[current_device];
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

cudaError_t submit(cudaStream_t stream, Work work) {
  if (stream->capture != nullptr) {
    stream->capture->nodes.push_back(std::move(work));
  } else {
    stream->queue.push_back(std::move(work));
    ++stream->enqueued;
  }
  return cudaSuccess;
}

cudaError_t forbidden_in_capture(State& s, const char* what) {
  if (s.captures.empty() || thread_capture_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (const cudaGraph_t graph : s.captures) graph->invalid = true;
  return refuse(cudaErrorStreamCaptureUnsupported,
                std::string(what) + " while a stream is captured");
}

namespace {

bool is_legacy(State& s, cudaStream_t stream) { return stream == s.legacy[stream->device]; }
cudaError_t synchronize(State& s, cudaStream_t stream, uint64_t ticket, const char* what) {
  if (stream->capture != nullptr) {
    stream->capture->invalid = true;
    return refuse(cudaErrorStreamCaptureUnsupported,
                  std::string(what) + " of a stream that is captured");
  }
  drain(s, stream, ticket);
  return result(s.sticky);
}

}  // namespace
}  // namespace cuda_host

using namespace cuda_host;

extern "C" {

// ---- for the tests

// Work that waits in streams.
int cuda_host_pending() {
  int count = 0;
  for (const cudaStream_t stream : state().streams) count += int(stream->queue.size());
  return count;
}
// Runs what a stream holds, without being a call of the runtime that a test would count.
int cuda_host_wait(cudaStream_t handle) {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> lock(s.mutex);
  const cudaStream_t stream = stream_of(s, handle);
  if (stream == nullptr || stream->capture != nullptr) return cudaErrorStreamCaptureUnsupported;
  drain(s, stream);
  return s.sticky;
}

// ---- streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  ENTER;
  if (flags != cudaStreamNonBlocking)
    return refuse(cudaErrorNotSupported, "a stream that waits for the legacy stream");
  *stream = new CUstream_st{current_device};
  s.streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return synchronize(s, stream, UINT64_MAX, __func__);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  ENTER;
  STREAM(handle);
  if (s.captures.count(event->capture) != 0) {  // the stream joins the capture
    if (is_legacy(s, stream)) return forbidden_in_capture(s, "a wait on the legacy stream");
    stream->capture = event->capture;
    return cudaSuccess;
  }
  const cudaStream_t before = event->stream;
  const uint64_t ticket = event->ticket;
  if (before == nullptr || before == stream || before->done >= ticket) return cudaSuccess;
  return submit(stream, [&s, before, ticket] { return drain(s, before, ticket), cudaSuccess; });
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  ENTER;
  *event = new CUevent_st{current_device};
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  ENTER;
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  ENTER;
  STREAM(handle);
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
// Whoever polls gets there: a piece of work an inquiry.
cudaError_t cudaEventQuery(cudaEvent_t event) {
  ENTER;
  TRY(forbidden_in_capture(s, __func__));
  if (event->stream == nullptr || event->stream->done >= event->ticket) return cudaSuccess;
  drain(s, event->stream, event->stream->done + 1);
  return cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ENTER;
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
  ENTER;
  STREAM(handle);
  if (is_legacy(s, stream) || stream->capture != nullptr)
    return result(cudaErrorStreamCaptureUnsupported);
  stream->capture = new CUgraph_st;
  stream->began_capture = true;
  s.captures.insert(stream->capture);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  ENTER;
  STREAM(handle);
  *graph = nullptr;
  if (!stream->began_capture) return result(cudaErrorIllegalState);
  stream->began_capture = false;
  const cudaGraph_t captured = stream->capture;
  for (const cudaStream_t joined : s.streams)
    if (joined->capture == captured) joined->capture = nullptr;
  s.captures.erase(captured);
  if (captured->invalid) return result(cudaErrorStreamCaptureInvalidated);
  *graph = captured;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  ENTER;
  STREAM(handle);
  const cudaGraph_t capture = stream->capture;
  *status = capture == nullptr ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  if (id != nullptr) *id = reinterpret_cast<uintptr_t>(capture);
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
  return *count = graph->nodes.size(), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long) {
  ENTER;
  *executable = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  ENTER;
  STREAM(handle);
  return submit(stream, [graph = reinterpret_cast<cudaGraph_t>(executable)] {
    for (const Work& node : graph->nodes) TRY(node());
    return cudaSuccess;
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

}  // extern "C"
