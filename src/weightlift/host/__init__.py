"""Facts about this machine: storage and its page cache, memory and its limits, processors."""
