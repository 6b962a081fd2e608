// What of the machine this process may use. Containers are told by cgroups, not by the hardware.
#ifndef DELTANET_SERVER_HOST_H_
#define DELTANET_SERVER_HOST_H_

#include <cstdint>
#include <string>

namespace deltanet {

// Bytes of memory: the least of MemAvailable and of the limits of every cgroup (version 2 or 1) above this
// process. `root` is "" but in tests. 0 if nothing can be read.
int64_t MemoryLimitBytes(const std::string& root = "");

// Processors: the least of the affinity mask and every cgroup's quota above this process, rounded up; at
// least 1.
int AvailableCpus(const std::string& root = "");

// What this process uses now; 0 what cannot be read.
struct ProcessUsage {
  double cpu_seconds = 0;  // Of all threads, in user and system mode, since the process began.
  int64_t resident_bytes = 0;
  int64_t open_fds = 0;
  int64_t threads = 0;
};
ProcessUsage MeasureProcess(const std::string& root = "");

}  // namespace deltanet

#endif  // DELTANET_SERVER_HOST_H_
