"""What runs inside a sandbox. The folder is all of the project that a sandbox can read; it uses the standard library."""
