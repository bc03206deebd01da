"""Sources of device-fault signals: NVML and Kubernetes, polled in threads; no torch."""
