"""Models on disk: read in the formats of others, converted, and kept in this engine's own."""
