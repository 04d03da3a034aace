"""The operators, a file each: schema, fake kernel, autograd and the public function, in reading order."""
