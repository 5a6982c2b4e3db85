"""One file per operation: formula, reference, autograd and public function."""
