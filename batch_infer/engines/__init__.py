"""Who hands requests to workers."""
