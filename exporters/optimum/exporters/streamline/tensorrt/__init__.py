"""From a checkpoint to a TensorRT engine: a strict graph with caches of a fixed length, its profiles, its builders."""
