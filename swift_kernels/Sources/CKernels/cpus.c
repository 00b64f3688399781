// How many threads are worth using: cores in the affinity mask, within the control group's quota.
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "cpus.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "pool.h"
#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__linux__)
// The lowest thread of the processor's core (its own number when the kernel does not say).
static int first_sibling(int cpu) {
  char path[96];
  snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
  FILE *file = fopen(path, "re");
  int first = cpu;
  if (file != NULL) {
    if (fscanf(file, "%d", &first) != 1) first = cpu;
    fclose(file);
  }
  return first;
}

void ms_cpus_read(ms_cpus *cpus) {
  cpu_set_t mask;
  static _Thread_local int16_t siblings[MS_MAX_CPUS], others[MS_MAX_CPUS];
  int32_t extra = 0;
  cpus->count = cpus->cores = 0;
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) CPU_ZERO(&mask);
  for (int cpu = 0; cpu < CPU_SETSIZE && cpu < MS_MAX_CPUS; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    const int16_t core = (int16_t)first_sibling(cpu);
    int32_t seen = 0;
    while (seen < cpus->cores && siblings[seen] != core) ++seen;
    if (seen == cpus->cores) {
      siblings[cpus->cores] = core;
      cpus->order[cpus->cores++] = (int16_t)cpu;
    } else {
      others[extra++] = (int16_t)cpu;
    }
  }
  memcpy(cpus->order + cpus->cores, others, (size_t)extra * sizeof *others);
  cpus->count = cpus->cores + extra;
}

// The smallest quota / period, in processors, of a control group and its parents; 0: none. `path` is cut down on the
// way.
static double group_quota(const char *root, char *path, const char *quota_file, const char *period_file) {
  double least = 0;
  for (;;) {
    char name[768];
    double quota = -1, period = 0;
    snprintf(name, sizeof name, "%s%s/%s", root, path, quota_file);
    FILE *file = fopen(name, "re");
    if (file != NULL) {
      // cgroup v2 has both in one file: "max 100000" or "150000 100000".
      const int wanted = period_file == NULL ? 2 : 1;
      if (fscanf(file, "%lf %lf", &quota, &period) < wanted) quota = -1;
      fclose(file);
    }
    if (period_file != NULL && quota > 0) {
      snprintf(name, sizeof name, "%s%s/%s", root, path, period_file);
      file = fopen(name, "re");
      if (file == NULL || fscanf(file, "%lf", &period) != 1) period = 0;
      if (file != NULL) fclose(file);
    }
    if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) least = quota / period;
    char *slash = strrchr(path, '/');
    if (slash == NULL) return least;
    *slash = '\0';
  }
}

// The control groups' limit in processors; 0: none.
static double quota(void) {
  FILE *file = fopen("/proc/self/cgroup", "re");
  char line[600];
  double least = 0;
  if (file == NULL) return 0;
  while (fgets(line, sizeof line, file) != NULL) {  // hierarchy:controllers:/path
    line[strcspn(line, "\n")] = '\0';
    char *controllers = strchr(line, ':');
    char *path = controllers == NULL ? NULL : strchr(controllers + 1, ':');
    if (path == NULL) continue;
    *path++ = '\0';
    if (strcmp(path, "/") == 0) *path = '\0';
    double found = 0;
    if (controllers[1] == '\0') {
      found = group_quota("/sys/fs/cgroup", path, "cpu.max", NULL);
    } else if (strncmp(controllers + 1, "cpu,", 4) == 0 || strcmp(controllers + 1, "cpu") == 0) {
      found = group_quota("/sys/fs/cgroup/cpu", path, "cpu.cfs_quota_us", "cpu.cfs_period_us");
    }
    if (found > 0 && (least == 0 || found < least)) least = found;
  }
  fclose(file);
  return least;
}
#elif defined(__APPLE__)
void ms_cpus_read(ms_cpus *cpus) {
  size_t size = sizeof cpus->count;
  if (sysctlbyname("hw.logicalcpu", &cpus->count, &size, NULL, 0) != 0) cpus->count = 1;
  size = sizeof cpus->cores;  // efficiency cores would hold every barrier back
  if (sysctlbyname("hw.perflevel0.physicalcpu", &cpus->cores, &size, NULL, 0) != 0) cpus->cores = cpus->count;
}
static double quota(void) { return 0; }
#else
void ms_cpus_read(ms_cpus *cpus) { cpus->count = cpus->cores = 1; }
static double quota(void) { return 0; }
#endif

int32_t ms_pool_default_threads(void) {
  const char *wanted = getenv("METALSTEP_THREADS");
  if (wanted != NULL && *wanted != '\0') {
    char *end;
    const long threads = strtol(wanted, &end, 10);
    return *end != '\0' || threads < 1 || threads > MS_MAX_CPUS ? -1 : (int32_t)threads;
  }
  ms_cpus cpus;
  ms_cpus_read(&cpus);
  int32_t threads = cpus.cores;
  const double limit = quota();
  if (limit > 0 && threads > limit) threads = (int32_t)limit;  // rounded down: a throttled thread holds all others
  return threads < 1 ? 1 : threads;
}
