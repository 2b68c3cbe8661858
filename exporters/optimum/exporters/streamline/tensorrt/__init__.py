"""From a checkpoint to a TensorRT engine: a graph with caches of a fixed length, its profiles, builders, runner."""
