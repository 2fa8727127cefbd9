"""Store weights in fewer bits; runs only when `options={"quantize": ...}` asks for it."""
