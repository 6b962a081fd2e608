#include "server/host.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <system_error>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace deltanet {
namespace {

std::optional<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::optional<int64_t> ParseInt(absl::string_view text) {
  int64_t value = 0;
  if (!absl::SimpleAtoi(absl::StripAsciiWhitespace(text), &value)) return std::nullopt;
  return value;
}

std::optional<int64_t> ReadInt(const std::string& path) {
  const std::optional<std::string> text = ReadFile(path);
  return text ? ParseInt(*text) : std::nullopt;
}

// The folders of this process's cgroup and of those above it, `mount` itself last: a limit anywhere on the
// way counts. Inside a container the path in /proc/self/cgroup can be the host's and not exist below the
// mount; the mount is then the container's own group.
std::vector<std::string> CgroupFolders(const std::string& mount, absl::string_view path) {
  std::vector<std::string> folders;
  while (!path.empty() && path != "/") {
    folders.push_back(absl::StrCat(mount, path));
    path = path.substr(0, path.rfind('/'));
  }
  folders.push_back(mount);
  return folders;
}

struct Cgroups {
  std::vector<std::string> unified;  // Version 2.
  std::vector<std::string> memory;   // Version 1.
  std::vector<std::string> cpu;
};

Cgroups FindCgroups(const std::string& root) {
  Cgroups found;
  const std::string mount = root + "/sys/fs/cgroup";
  for (const absl::string_view line :
       absl::StrSplit(ReadFile(root + "/proc/self/cgroup").value_or(""), '\n')) {
    // "hierarchy:controllers:path"; version 2 has no controllers.
    const std::vector<absl::string_view> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    if (parts[1].empty()) found.unified = CgroupFolders(mount, parts[2]);
    for (const absl::string_view controller : absl::StrSplit(parts[1], ',')) {
      if (controller == "memory") found.memory = CgroupFolders(mount + "/memory", parts[2]);
      if (controller == "cpu") found.cpu = CgroupFolders(mount + "/cpu", parts[2]);
    }
  }
  return found;
}

}  // namespace

int64_t MemoryLimitBytes(const std::string& root) {
  std::optional<int64_t> least;
  const auto consider = [&least](std::optional<int64_t> bytes) {
    if (bytes) least = std::min(least.value_or(*bytes), *bytes);
  };
  const std::string meminfo = ReadFile(root + "/proc/meminfo").value_or("");
  for (absl::string_view line : absl::StrSplit(meminfo, '\n')) {
    if (!absl::ConsumePrefix(&line, "MemAvailable:") || !absl::ConsumeSuffix(&line, "kB")) continue;
    if (const std::optional<int64_t> kib = ParseInt(line)) consider(*kib * 1024);
  }
  const Cgroups cgroups = FindCgroups(root);
  for (const std::string& folder : cgroups.unified) {
    consider(ReadInt(folder + "/memory.max"));  // "max" is no number: no limit.
  }
  for (const std::string& folder : cgroups.memory) {
    consider(ReadInt(folder + "/memory.limit_in_bytes"));
  }
  return least.value_or(0);
}

int AvailableCpus(const std::string& root) {
  int64_t cpus = 1;
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) cpus = std::max(1, CPU_COUNT(&mask));
  const auto consider_quota = [&cpus](std::optional<int64_t> quota, std::optional<int64_t> period) {
    if (!quota || !period || *quota <= 0 || *period <= 0) return;  // -1 and "max": no quota.
    cpus = std::min(cpus, std::max<int64_t>(1, (*quota + *period - 1) / *period));
  };

  const Cgroups cgroups = FindCgroups(root);
  for (const std::string& folder : cgroups.unified) {
    const std::string text = ReadFile(folder + "/cpu.max").value_or("");
    const std::vector<absl::string_view> parts = absl::StrSplit(text, ' ');
    if (parts.size() == 2) consider_quota(ParseInt(parts[0]), ParseInt(parts[1]));
  }
  for (const std::string& folder : cgroups.cpu) {
    consider_quota(ReadInt(folder + "/cpu.cfs_quota_us"), ReadInt(folder + "/cpu.cfs_period_us"));
  }
  return static_cast<int>(cpus);
}

ProcessUsage MeasureProcess(const std::string& root) {
  ProcessUsage usage;
  // "pid (name) state ...": the name may hold anything, so count the fields behind it. Numbers as in proc(5).
  const std::string stat = ReadFile(root + "/proc/self/stat").value_or("");
  const size_t name_end = stat.rfind(')');
  const std::vector<absl::string_view> fields =
      absl::StrSplit(name_end == std::string::npos ? "" : absl::string_view(stat).substr(name_end + 1), ' ');
  const auto field = [&fields](size_t number) -> int64_t {
    const size_t index = number - 2;  // fields[0] is the empty one before the state, number 3.
    return index < fields.size() ? ParseInt(fields[index]).value_or(0) : 0;
  };
  usage.cpu_seconds = static_cast<double>(field(14) + field(15)) / static_cast<double>(sysconf(_SC_CLK_TCK));
  usage.threads = field(20);
  usage.resident_bytes = field(24) * sysconf(_SC_PAGESIZE);
  std::error_code error;
  for (std::filesystem::directory_iterator it(root + "/proc/self/fd", error), end; !error && it != end;
       it.increment(error)) {
    ++usage.open_fds;
  }
  return usage;
}

}  // namespace deltanet
