/* A libnvidia-ml.so.1 with two GPUs, as far as the service asks: prototypes from NVIDIA's public nvml.h.
 *
 * FAKE_NVML_INIT   what nvmlInit returns (9: driver not loaded)
 * FAKE_NVML_USED   a file with the bytes in use on GPU 1, read on every call, so that a test can change them
 * FAKE_NVML_PROC   who uses 512 MiB of GPU 1: "self", "hidden" (a size that is not available), "other" (an id
 *                  of another namespace), "forbidden" (the call is not permitted); nobody when it is not set
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int nvmlReturn_t;
typedef struct gpu { unsigned int index; const char *uuid; unsigned long long total; } *nvmlDevice_t;
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } nvmlMemory_v2_t;
typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NO_PERMISSION = 4, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };

static struct gpu gpus[] = {
    {0, "GPU-aaaaaaaa-0000-0000-0000-000000000000", 8ULL << 30},
    {1, "GPU-bbbbbbbb-1111-1111-1111-111111111111", 16ULL << 30},
};

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) { (void)flags; return atoi(setting("FAKE_NVML_INIT")); }
nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
nvmlReturn_t nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(nvmlReturn_t code) {
    switch (code) {
    case NO_PERMISSION: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return SUCCESS; }

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    if (index >= 2) return INVALID_ARGUMENT;
    *device = &gpus[index];
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    for (unsigned int i = 0; i < 2; i++)
        if (strcmp(uuid, gpus[i].uuid) == 0) return nvmlDeviceGetHandleByIndex_v2(i, device);
    return NOT_FOUND;
}

static nvmlReturn_t copy(char *to, unsigned int length, const char *from) {
    if (strlen(from) >= length) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length) {
    return copy(uuid, length, device->uuid);
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length) {
    return copy(name, length, device->index ? "Fake 16 GiB" : "Fake 8 GiB");
}

nvmlReturn_t nvmlDeviceGetNumGpuCores(nvmlDevice_t device, unsigned int *cores) {
    *cores = 34 * 128;
    return device->index ? NO_PERMISSION : SUCCESS; /* the second does not tell */
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor) {
    *major = 8, *minor = 9;
    return device->index ? NO_PERMISSION : SUCCESS;
}

static nvmlReturn_t used_bytes(nvmlDevice_t device, unsigned long long *used) {
    *used = 1ULL << 30;
    const char *path = getenv("FAKE_NVML_USED");
    if (!device->index || !path) return SUCCESS;
    FILE *file = fopen(path, "r");
    int read = file ? fscanf(file, "%llu", used) : 0;
    if (file) fclose(file);
    return read == 1 ? SUCCESS : GPU_IS_LOST;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    nvmlReturn_t code = used_bytes(device, &memory->used);
    memory->total = device->total;
    memory->free = memory->total - memory->used;
    return code;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    nvmlReturn_t code = used_bytes(device, &memory->used);
    memory->total = device->total;
    memory->reserved = 0;
    memory->free = memory->total - memory->used;
    return code;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *infos) {
    const char *who = setting("FAKE_NVML_PROC");
    if (strcmp(who, "forbidden") == 0) return NO_PERMISSION;
    if (!device->index || !*who) { *count = 0; return SUCCESS; }
    unsigned int room = *count;
    *count = 1;
    if (!infos || room < 1) return INSUFFICIENT_SIZE;
    infos[0].pid = strcmp(who, "other") == 0 ? 1 : (unsigned int)getpid();
    infos[0].usedGpuMemory = strcmp(who, "hidden") == 0 ? ~0ULL : 512ULL << 20; /* ~0: NVML_VALUE_NOT_AVAILABLE */
    infos[0].gpuInstanceId = infos[0].computeInstanceId = 0;
    return SUCCESS;
}
