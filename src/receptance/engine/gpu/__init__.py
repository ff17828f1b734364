"""The fast path on one NVIDIA GPU: `GpuModel` decodes and reads prompts in place on a pool of states."""
