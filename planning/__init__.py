"""Plan a run before it starts: sizes, memory, time and the expected result."""
