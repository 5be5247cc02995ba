"""Programs that measure; nothing in the library needs them."""
