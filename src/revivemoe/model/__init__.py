"""Model code of `transformers`, unmodified, behind paged KV and dispatched experts."""
