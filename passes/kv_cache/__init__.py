"""Rewrites of KV caches: growing caches are appended to in place, fixed ones are written in place."""
