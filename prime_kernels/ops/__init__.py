"""One file an operation: formula, reference, autograd and public function."""
