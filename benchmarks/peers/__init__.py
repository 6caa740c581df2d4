"""What is measured, one file a system. Each runs in a process, and the other libraries in an environment, of its own."""
