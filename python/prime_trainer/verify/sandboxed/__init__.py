"""What runs inside a sandbox: the one folder of the project that a sandbox can read. Standard library only."""
