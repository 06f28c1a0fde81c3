"""What a process needs: errors, signals, ranks, locks, caches and provenance."""
