#include "server/host.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "gtest/gtest.h"

namespace deltanet {
namespace {

class Host : public ::testing::Test {
 protected:
  Host()
      : root_(std::filesystem::path(::testing::TempDir()) /
              ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::remove_all(root_);
  }
  ~Host() override { std::filesystem::remove_all(root_); }

  void Write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root_.string() + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }

  const std::filesystem::path root_;
};

TEST_F(Host, NothingToReadIsNoLimit) {
  EXPECT_EQ(MemoryLimitBytes(root_.string()), 0);
  EXPECT_GE(AvailableCpus(root_.string()), 1);
}

TEST_F(Host, WithoutCgroupsTheAvailableMemoryCounts) {
  Write("/proc/meminfo", "MemTotal:       4000 kB\nMemAvailable:   1000 kB\nBuffers: 1 kB\n");
  EXPECT_EQ(MemoryLimitBytes(root_.string()), 1000 * 1024);
}

TEST_F(Host, Version2LimitsOfAllGroupsAboveCount) {
  Write("/proc/meminfo", "MemAvailable:   1000000 kB\n");
  Write("/proc/self/cgroup", "0::/a/b\n");
  Write("/sys/fs/cgroup/a/b/memory.max", "max\n");
  Write("/sys/fs/cgroup/a/memory.max", "500000\n");
  Write("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  Write("/sys/fs/cgroup/a/cpu.max", "100000 100000\n");
  EXPECT_EQ(MemoryLimitBytes(root_.string()), 500000);
  EXPECT_EQ(AvailableCpus(root_.string()), 1);
}

TEST_F(Host, InAContainerTheMountIsTheGroup) {
  Write("/proc/meminfo", "MemAvailable:   1000000 kB\n");
  Write("/proc/self/cgroup", "0::/docker/0123\n");
  Write("/sys/fs/cgroup/memory.max", "300000\n");
  EXPECT_EQ(MemoryLimitBytes(root_.string()), 300000);
}

TEST_F(Host, Version1) {
  Write("/proc/meminfo", "MemAvailable:   1000000 kB\n");
  Write("/proc/self/cgroup", "4:memory:/x\n1:cpu,cpuacct:/y\n");
  Write("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "400000\n");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  Write("/sys/fs/cgroup/cpu/y/cpu.cfs_quota_us", "50000\n");
  Write("/sys/fs/cgroup/cpu/y/cpu.cfs_period_us", "100000\n");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  Write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(MemoryLimitBytes(root_.string()), 400000);
  EXPECT_EQ(AvailableCpus(root_.string()), 1);
}

TEST_F(Host, UsageOfTheProcess) {
  Write("/proc/self/stat",
        "7 (a) b (c)) S 1 7 7 0 -1 4194560 100 0 0 0 250 150 0 0 20 0 12 0 1000 90000000 300 18446744\n");
  Write("/proc/self/fd/0", "");
  Write("/proc/self/fd/1", "");
  const ProcessUsage usage = MeasureProcess(root_.string());
  EXPECT_DOUBLE_EQ(usage.cpu_seconds, 400.0 / static_cast<double>(sysconf(_SC_CLK_TCK)));
  EXPECT_EQ(usage.threads, 12);
  EXPECT_EQ(usage.resident_bytes, 300 * sysconf(_SC_PAGESIZE));
  EXPECT_EQ(usage.open_fds, 2);
  EXPECT_EQ(MeasureProcess((root_ / "nowhere").string()).threads, 0);
}

TEST_F(Host, ThisProcessUsesSome) {
  ProcessUsage usage = MeasureProcess();
  // The kernel counts in ticks of 10 ms, and this process may be younger: measuring takes time too.
  while (usage.cpu_seconds == 0) usage = MeasureProcess();
  EXPECT_LT(usage.cpu_seconds, 100);
  EXPECT_GE(usage.threads, 1);
  EXPECT_GT(usage.resident_bytes, 1000000);
  EXPECT_GE(usage.open_fds, 3);
}

TEST_F(Host, ThisMachineHasSome) { EXPECT_GT(MemoryLimitBytes(), 0); }

}  // namespace
}  // namespace deltanet
