"""The machine: NVML and sysfs, what watches them during a run, and `edgellm doctor`."""
