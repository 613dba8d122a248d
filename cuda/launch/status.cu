/*
 * Version, status names and the message of the last failed call of a thread.
 */
#include <cstdarg>
#include <cstdio>

#include "common/host.cuh"

namespace dspark {
namespace {

constexpr size_t kMessageBytes = 512;
thread_local char last_message[kMessageBytes] = "";

}  // namespace

dspark_status fail(dspark_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_message, kMessageBytes, format, args);
  va_end(args);
  return status;
}

}  // namespace dspark

#define DSPARK_STRINGIFY_VALUE(x) #x
#define DSPARK_STRINGIFY(x) DSPARK_STRINGIFY_VALUE(x)

extern "C" {

const char* DSPARK_FN(dspark_version)(void) {
  return DSPARK_STRINGIFY(DSPARK_VERSION_MAJOR) "." DSPARK_STRINGIFY(
      DSPARK_VERSION_MINOR) "." DSPARK_STRINGIFY(DSPARK_VERSION_PATCH);
}

const char* DSPARK_FN(dspark_status_name)(dspark_status status) {
  switch (status) {
#define DSPARK_STATUS_CASE(name) \
  case name:                     \
    return #name;
    DSPARK_STATUS_CASE(DSPARK_OK)
    DSPARK_STATUS_CASE(DSPARK_ERROR_NULL_POINTER)
    DSPARK_STATUS_CASE(DSPARK_ERROR_INVALID_ARGUMENT)
    DSPARK_STATUS_CASE(DSPARK_ERROR_STRUCT_SIZE)
    DSPARK_STATUS_CASE(DSPARK_ERROR_MISALIGNED)
    DSPARK_STATUS_CASE(DSPARK_ERROR_WORKSPACE_TOO_SMALL)
    DSPARK_STATUS_CASE(DSPARK_ERROR_UNSUPPORTED_DTYPE)
    DSPARK_STATUS_CASE(DSPARK_ERROR_UNSUPPORTED_SHAPE)
    DSPARK_STATUS_CASE(DSPARK_ERROR_UNSUPPORTED_DEVICE)
    DSPARK_STATUS_CASE(DSPARK_ERROR_CUDA)
    DSPARK_STATUS_CASE(DSPARK_ERROR_INTERNAL)
#undef DSPARK_STATUS_CASE
    default:
      return "DSPARK_ERROR_UNKNOWN";
  }
}

const char* DSPARK_FN(dspark_last_error)(void) { return dspark::last_message; }

}  // extern "C"
