#include "model/torch_guard.h"

#include <c10/util/Exception.h>

#include <exception>
#include <new>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace deltanet {
namespace {

std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

absl::Status StatusOfCurrentException(absl::string_view what) {
  try {
    throw;
  } catch (const c10::OutOfMemoryError& error) {
    return absl::ResourceExhaustedError(absl::StrCat(what, ": ", FirstLine(error.what_without_backtrace())));
  } catch (const c10::Error& error) {
    const std::string line = FirstLine(error.what_without_backtrace());
    // The CPU allocator throws a plain c10::Error.
    if (absl::StrContains(line, "can't allocate memory")) {
      return absl::ResourceExhaustedError(absl::StrCat(what, ": ", line));
    }
    return absl::InternalError(absl::StrCat(what, ": ", line));
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(what, ": out of host memory"));
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat(what, ": ", FirstLine(error.what())));
  } catch (...) {
    return absl::InternalError(absl::StrCat(what, ": unknown exception"));
  }
}

}  // namespace deltanet
