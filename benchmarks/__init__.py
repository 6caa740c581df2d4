"""Speed and memory, measured beside naive twins and other libraries. Never run by pytest."""
