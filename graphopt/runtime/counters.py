"""How often things happened in this process: "graphs", "fallbacks", "rewrites", "kv_copies", ..."""

from __future__ import annotations

import collections

counters: collections.Counter[str] = collections.Counter()
