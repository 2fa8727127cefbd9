"""What lives at call time and between processes: caches, packed weights, KV buffers, launches."""
