"""SAEs that others published: one small reader a format, chosen by what a folder holds; see docs/interop.md."""
